"""report.html: a self-contained page of the results of a run."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from .config import TuneConfig
from .mistakes import ChangedImage, Confusion, thumbnail
from .plots import accuracy_svg, coloured, finite, kept_svg, loss_svg

_PIXEL_ART = 64  # images up to this size are enlarged without smoothing, and stored as PNG
_MISSING = "–"
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
    changed: Sequence[ChangedImage],
    confusions: Sequence[Confusion],
) -> str:
    """Return the page.

    Args:
        config: Configuration of the run.
        metrics: Contents of metrics.json. Missing values are left out, or shown as a dash.
        rows: Contents of metrics.jsonl; empty for a method without epochs.
        changed: See `changed_images`.
        confusions: See `confusions`.
    """
    tests = list(metrics["classes"])
    epochs = f"{metrics['epochs']} epoch{'' if metrics['epochs'] == 1 else 's'}"
    state = "" if metrics["status"] == "complete" else f" – {metrics['status']} after {epochs}"
    title = _text(f"{config.model} on {config.data}, {config.method}, {config.shots_text}{state}")
    protocol = _text(str(metrics.get("protocol", "")))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1><p class="quiet">{protocol}</p>
{_accuracy(metrics, tests)}
{"".join(f'<p class="worse">{_text(note)}</p>' for note in metrics.get("notes", ()))}
{_charts(metrics, rows, coloured(tests))}
{_time(metrics, rows)}
{_cost(config, metrics, rows)}
{_gallery("Most frequent confusions", tests, [(each.test, _confusion(each)) for each in confusions])}
{_gallery("Predictions changed by tuning", tests, [(each.test, _changed(each)) for each in changed])}
<details class="settings"><summary>Settings</summary><pre>{_text(config.to_yaml())}</pre></details>
</body></html>
"""


def _text(text: str) -> str:
    """Escape for HTML; characters that UTF-8 can't encode, such as a lone surrogate of a file name, become "?"."""
    return html.escape(text.encode(errors="replace").decode())


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return f"{value:{spec}}{unit}" if finite(value) else _MISSING


def _accuracy(metrics: Mapping[str, Any], tests: list[str]) -> str:
    """Table of zero-shot and tuned accuracy, of each test and of the summaries of the protocol."""
    zero_shot, tuned, classes = metrics["zero_shot"], metrics["tuned"] or {}, metrics["classes"]
    lines = []
    for name in [*tests, *(name for name in zero_shot if name not in tests)]:
        before, after = zero_shot.get(name), tuned.get(name)
        label = _text(name if name in tests else _SUMMARIES.get(name, name))
        label += ", trained on" if name == tests[0] else ""
        change = f"<td>{_MISSING}</td>"
        if finite(before) and finite(after):
            verdict = "better" if after > before else "worse" if after < before else ""
            change = f'<td class="{verdict}">{after - before:+.2f}</td>'
        lines.append(
            f'<tr class="{"test" if name in tests else "summary"}"><td>{label}</td><td>{classes.get(name, "")}</td>'
            f"<td>{_number(before, '.2f')}</td><td>{_number(after, '.2f')}</td>{change}</tr>"
        )
    heads = "".join(f"<th>{head}</th>" for head in ("accuracy, %", "classes", "zero-shot", "tuned", "change"))
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _charts(metrics: Mapping[str, Any], rows: list[dict[str, Any]], colours: Mapping[str, str]) -> str:
    """Plots of loss, accuracy, and number of kept classes if it varies."""
    legend = " ".join(f"<span>{_dot(colour)}{_text(name)}</span>" for name, colour in colours.items())
    kept = _kept(rows)
    charts = (
        ("training loss", loss_svg(rows), ""),
        ("test accuracy, % (dotted: zero-shot)", accuracy_svg(rows, metrics["zero_shot"], colours), legend),
        ("kept classes per step", kept_svg(kept) if len(kept) > 1 else "", ""),
    )
    figures = "".join(
        f'<figure><figcaption>{title}</figcaption>{svg}<div class="legend">{below}</div></figure>'
        for title, svg, below in charts
        if svg
    )
    return f'<h2>Training</h2><div class="charts">{figures}</div>' if figures else ""


def _kept(rows: list[dict[str, Any]]) -> Counter[int]:
    """Number of steps by number of kept classes."""
    kept: Counter[int] = Counter()
    for row in rows:
        kept.update({int(classes): steps for classes, steps in (row.get("kept_histogram") or {}).items()})
    return kept


def _time(metrics: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """Time by stage of all epochs, and by part of a forward."""
    seconds: Counter[str] = Counter()
    for row in rows:
        seconds.update(row.get("stage_seconds") or {})
    forward = metrics["cost"].get("forward_milliseconds") or {}
    bars = _bar("all epochs", seconds, "s") + _bar("forward of one step", forward, "ms")
    return f"<h2>Time</h2>{bars}" if bars else ""


def _bar(title: str, times: Mapping[str, float], unit: str) -> str:
    """Stacked bar with a table of its parts."""
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
    trained_on, spec = next(iter(metrics["classes"].values())), ",.0f" if len(_kept(rows)) == 1 else ",.1f"
    lines = {
        "run": _number(cost["seconds_total"], ",.1f", " s"),
        "epoch": _number(cost["seconds_per_epoch"], ",.2f", " s"),
        "step": _number(cost["milliseconds_per_step"], ",.2f", " ms"),
        "peak memory": _number(cost["peak_memory_mib"], ",.0f", " MiB"),
        "memory before loading the model": _number(cost["baseline_memory_mib"], ",.0f", " MiB"),
        "kept classes per step": _number(kept, spec, f" of {trained_on:,}"),
        "trained parameters": f"{parameters['trained']:,} of {parameters['all']:,}",
        "checkpoint": _number(metrics.get("checkpoint", {}).get("mib"), ",.1f", " MiB"),
        "device": _text(f"{cost['device']}, {config.precision}"),
    }
    table = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in lines.items() if value != _MISSING)
    return f"<h2>Cost</h2><table>{table}</table>"


def _gallery(title: str, tests: list[str], cards: list[tuple[str, str]]) -> str:
    """Section of cards (test, HTML), grouped by test; the first two groups are open."""
    parts = {name: "".join(card for test, card in cards if test == name) for name in tests}
    shown = "".join(
        f"<details{' open' if position < 2 else ''}><summary>{_text(name)}</summary>"
        f'<div class="cards">{part}</div></details>'
        for position, (name, part) in enumerate(parts.items())
        if part
    )
    return f"<h2>{title}</h2>{shown}" if shown else ""


def _confusion(confusion: Confusion) -> str:
    image = "" if confusion.predicted_image is None else _image(confusion.predicted_image, confusion.predicted)
    return (
        f'<div class="card pair"><figure>{_image(confusion.image, confusion.label)}'
        f"<figcaption><b>{_text(confusion.label)}</b></figcaption></figure>"
        f"<figure>{image}<figcaption>{confusion.count} of {confusion.total} as <b>{_text(confusion.predicted)}</b>"
        "</figcaption></figure></div>"
    )


def _changed(changed: ChangedImage) -> str:
    predictions = "".join(
        f'<br>{when}: <span class="{"better" if predicted == changed.label else "worse"}">{_text(predicted)}</span>'
        for when, predicted in (("zero-shot", changed.zero_shot), ("tuned", changed.tuned))
    )
    caption = f"<figcaption><b>{_text(changed.label)}</b>{predictions}</figcaption>"
    return f'<figure class="card">{_image(changed.image, changed.label)}{caption}</figure>'


def _dot(colour: str) -> str:
    return f'<span class="dot" style="color:{colour}"></span>'


def _image(image: Image.Image, label: str) -> str:
    """<img> element with embedded image data."""
    image, buffer = thumbnail(image), io.BytesIO()
    pixels = max(image.size) <= _PIXEL_ART
    image.save(buffer, "png" if pixels else "jpeg", quality=80)
    kind = 'class="pixels" src="data:image/png' if pixels else 'src="data:image/jpeg'
    return f'<img alt="{_text(label)}" {kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'
