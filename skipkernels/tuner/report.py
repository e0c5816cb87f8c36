"""report.html: one file without links that shows what a run did."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from .config import TuneConfig
from .mistakes import Confusion, Example, picture
from .plots import accuracy_svg, coloured, finite, kept_svg, loss_svg

_PIXEL_ART = 64  # up to this side a picture is shown enlarged, pixel by pixel, and kept without loss
_NOTHING = "–"  # where there is no value
_SUMMARIES = {"harmonic": "harmonic mean", "targets": "mean of the targets"}

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.quiet { opacity: .7; margin-top: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.summary td { font-weight: 600; }
.better { color: #2e9e5b; } .worse { color: #d1495b; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.5rem; }
.charts figcaption, .above { font-weight: 600; margin: 1rem 0 .4rem; }
.charts svg { width: 100%; height: auto; max-width: 34rem; }
.charts text { font-family: inherit !important; }
.legend > span { margin-right: 1em; white-space: nowrap; }
.dot::before { content: "●"; margin-right: .35em; }
.bar { display: flex; height: 1.6rem; border-radius: .3rem; overflow: hidden; }
.cards { display: flex; flex-wrap: wrap; gap: 1.2rem; padding: .6rem 0; }
.card { width: 11rem; font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; width: 13rem; }
.pair { background: #8882; border-radius: .4rem; padding: .6rem; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 96px; height: 96px; object-fit: contain; object-position: left; margin-bottom: .3rem; }
.pixels { image-rendering: pixelated; }
pre { overflow-x: auto; } summary { cursor: pointer; font-weight: 600; } .settings { margin: 2.2rem 0; }
"""


def report_html(
    config: TuneConfig,
    metrics: Mapping[str, Any],
    rows: list[dict[str, Any]],
    examples: Sequence[Example],
    confusions: Sequence[Confusion],
) -> str:
    """The page.

    Args:
        config: The run.
        metrics: What metrics.json holds. What it has no value for is left out, or shown as a dash.
        rows: What metrics.jsonl holds; none for a method without epochs.
        examples: Test images that tuning mended or broke.
        confusions: Classes that are often taken for others.
    """
    tests = list(metrics["classes"])
    epochs = f"{metrics['epochs']} epoch{'' if metrics['epochs'] == 1 else 's'}"
    state = "" if metrics["status"] == "complete" else f" – {metrics['status']} after {epochs}"
    title = _text(f"{config.model} on {config.data}, {config.method}, {config.shots} shots{state}")
    protocol = _text(str(metrics.get("protocol", "")))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1><p class="quiet">{protocol}</p>
{_accuracy(metrics, tests)}
{"".join(f'<p class="worse">{_text(note)}</p>' for note in metrics.get("notes", ()))}
{_charts(metrics, rows, coloured(tests))}
{_budget(metrics, rows)}
{_cost(config, metrics, rows)}
{_gallery("What is taken for what", tests, [(each.test, _confusion(each)) for each in confusions])}
{_gallery("What tuning mended and broke", tests, [(each.test, _example(each)) for each in examples])}
<details class="settings"><summary>Settings</summary><pre>{_text(config.to_yaml())}</pre></details>
</body></html>
"""


def _text(text: str) -> str:
    """As HTML; what no file can hold, such as half of a surrogate pair from a file's name, becomes "?"."""
    return html.escape(text.encode(errors="replace").decode())


def _number(value: float | None, how: str, unit: str = "") -> str:
    return f"{value:{how}}{unit}" if finite(value) else _NOTHING


def _verdict(before: float, after: float) -> str:
    return "better" if after > before else "worse" if after < before else ""


def _accuracy(metrics: Mapping[str, Any], tests: list[str]) -> str:
    """Zero-shot and tuned, of every test and of what the protocol reports of them."""
    zero_shot, tuned, classes = metrics["zero_shot"], metrics["tuned"] or {}, metrics["classes"]
    lines = []
    for name in [*tests, *(name for name in zero_shot if name not in tests)]:
        before, after = zero_shot.get(name), tuned.get(name)
        label = _text(name if name in tests else _SUMMARIES.get(name, name))
        label += ", tuned on" if name == tests[0] else ""
        change = f"<td>{_NOTHING}</td>"
        if finite(before) and finite(after):
            change = f'<td class="{_verdict(before, after)}">{after - before:+.2f}</td>'
        lines.append(
            f'<tr class="{"test" if name in tests else "summary"}"><td>{label}</td><td>{classes.get(name, "")}</td>'
            f"<td>{_number(before, '.2f')}</td><td>{_number(after, '.2f')}</td>{change}</tr>"
        )
    heads = "".join(f"<th>{head}</th>" for head in ("accuracy, %", "classes", "zero-shot", "tuned", "change"))
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _charts(metrics: Mapping[str, Any], rows: list[dict[str, Any]], colours: Mapping[str, str]) -> str:
    """Loss, accuracy, and how many classes were compared, where that varies."""
    legend = " ".join(f"<span>{_dot(colour)}{_text(name)}</span>" for name, colour in colours.items())
    kept = _kept(rows)
    charts = (
        ("training loss", loss_svg(rows), ""),
        ("test accuracy, % (dotted: zero-shot)", accuracy_svg(rows, metrics["zero_shot"], colours), legend),
        ("how many classes were compared", kept_svg(kept) if len(kept) > 1 else "", ""),
    )
    figures = "".join(
        f'<figure><figcaption>{title}</figcaption>{svg}<div class="legend">{below}</div></figure>'
        for title, svg, below in charts
        if svg
    )
    return f'<h2>Training</h2><div class="charts">{figures}</div>' if figures else ""


def _kept(rows: list[dict[str, Any]]) -> Counter[int]:
    """Steps by the number of classes that were compared."""
    kept: Counter[int] = Counter()
    for row in rows:
        kept.update({int(classes): steps for classes, steps in (row.get("kept_histogram") or {}).items()})
    return kept


def _budget(metrics: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """Where the time of the epochs went, and that of the forward of a step."""
    seconds: Counter[str] = Counter()
    for row in rows:
        seconds.update(row.get("budget") or {})
    forward = metrics["cost"].get("forward_milliseconds") or {}
    bars = _bar("in all epochs", seconds, "s") + _bar("in the forward of a step", forward, "ms")
    return f"<h2>Where the time went</h2>{bars}" if bars else ""


def _bar(title: str, times: Mapping[str, float], unit: str) -> str:
    """One bar, and what its parts are."""
    total = sum(times.values())
    if not total:
        return ""
    bar, lines = "", ""
    for (name, part), colour in zip(times.items(), coloured(times).values(), strict=True):
        share = f"{100 * part / total:.1f}"
        bar += f'<span title="{_text(name)}, {share} %" style="flex:{share} 0 0;background:{colour}"></span>'
        lines += f"<tr><td>{_dot(colour)}{_text(name)}</td><td>{part:,.2f} {unit}</td><td>{share} %</td></tr>"
    return f'<p class="above">{title}</p><div class="bar">{bar}</div><table>{lines}</table>'


def _cost(config: TuneConfig, metrics: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    cost, parameters, kept = metrics["cost"], metrics["parameters"], metrics["kept_classes"]
    trained_on, how = next(iter(metrics["classes"].values())), ",.0f" if len(_kept(rows)) == 1 else ",.1f"
    lines = {
        "time of the run": _number(cost["seconds_total"], ",.1f", " s"),
        "time of an epoch": _number(cost["seconds_per_epoch"], ",.2f", " s"),
        "time of a step": _number(cost["milliseconds_per_step"], ",.2f", " ms"),
        "peak memory": _number(cost["peak_memory_mib"], ",.0f", " MiB"),
        "before the model was loaded": _number(cost["baseline_memory_mib"], ",.0f", " MiB"),
        "classes compared in a step": _number(kept, how, f" of {trained_on:,}"),
        "trained parameters": f"{parameters['trained']:,} of {parameters['all']:,}",
        "checkpoint": _number(metrics.get("checkpoint", {}).get("mib"), ",.1f", " MiB"),
        "device": _text(f"{cost['device']}, {config.precision}"),
    }
    table = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in lines.items() if value != _NOTHING)
    return f"<h2>Cost</h2><table>{table}</table>"


def _gallery(title: str, tests: list[str], cards: list[tuple[str, str]]) -> str:
    """Cards (test, HTML) below a heading, those of a test together; two tests are open."""
    parts = {name: "".join(card for test, card in cards if test == name) for name in tests}
    shown = "".join(
        f"<details{' open' if place < 2 else ''}><summary>{_text(name)}</summary>"
        f'<div class="cards">{part}</div></details>'
        for place, (name, part) in enumerate(parts.items())
        if part
    )
    return f"<h2>{title}</h2>{shown}" if shown else ""


def _confusion(confusion: Confusion) -> str:
    taken = "" if confusion.taken_image is None else _image(confusion.taken_image, confusion.taken_for)
    return (
        f'<div class="card pair"><figure>{_image(confusion.image, confusion.label)}'
        f"<figcaption><b>{_text(confusion.label)}</b></figcaption></figure>"
        f"<figure>{taken}<figcaption>{confusion.count} of {confusion.of} as <b>{_text(confusion.taken_for)}</b>"
        "</figcaption></figure></div>"
    )


def _example(example: Example) -> str:
    answers = "".join(
        f'<br>{when}: <span class="{"better" if said == example.label else "worse"}">{_text(said)}</span>'
        for when, said in (("zero-shot", example.zero_shot), ("tuned", example.tuned))
    )
    caption = f"<figcaption><b>{_text(example.label)}</b>{answers}</figcaption>"
    return f'<figure class="card">{_image(example.image, example.label)}{caption}</figure>'


def _dot(colour: str) -> str:
    return f'<span class="dot" style="color:{colour}"></span>'


def _image(image: Image.Image, label: str) -> str:
    """An <img> that holds its picture."""
    image, buffer = picture(image), io.BytesIO()
    pixels = max(image.size) <= _PIXEL_ART
    image.save(buffer, "png" if pixels else "jpeg", quality=80)
    kind = 'class="pixels" src="data:image/png' if pixels else 'src="data:image/jpeg'
    return f'<img alt="{_text(label)}" {kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
