"""report.html: one file without links that shows what a run did."""

from __future__ import annotations

import base64
import html
import io
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from .config import TuneConfig

_BASE, _NEW, _LOSS, _GREY = "#3b7dd8", "#d9822b", "#7a5ccc", "#808080"  # readable on white and on black

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.better { color: #2e9e5b; } .worse { color: #d1495b; }
.examples { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: 11.5rem; font-size: .8rem; line-height: 1.3; }
figure img { width: 64px; image-rendering: pixelated; }
svg { width: 100%; height: auto; }
details { margin: 1rem 0; } summary { cursor: pointer; }
"""


class Example(NamedTuple):
    """A test image, its class, and the classes that came first before and after tuning."""

    split: str
    image: Image.Image
    label: str
    zero_shot: str
    tuned: str


def report_html(
    config: TuneConfig, metrics: dict[str, Any], rows: list[dict[str, Any]], examples: list[Example]
) -> str:
    """The page.

    Args:
        config: The run.
        metrics: What metrics.json holds; at least one epoch is complete.
        rows: What metrics.jsonl holds.
        examples: Test images that tuning mended or broke.
    """
    zero_shot, tuned, cost = metrics["zero_shot"], metrics["tuned"], metrics["cost"]
    accuracy = "".join(
        f"<tr><td>{label}</td><td>{zero_shot[key]:.2f} %</td><td>{tuned[key]:.2f} %</td>"
        f'<td class="{_verdict(tuned[key] >= zero_shot[key])}">{tuned[key] - zero_shot[key]:+.2f}</td></tr>'
        for key, label in (
            ("base", f"{metrics['classes']['base']} base classes, tuned on"),
            ("new", f"{metrics['classes']['new']} new classes, never seen in tuning"),
            ("harmonic", "harmonic mean"),
        )
    )
    costs = "".join(
        f"<tr><td>{label}</td><td>{value}</td></tr>"
        for label, value in (
            ("time of an epoch", f"{cost['seconds_per_epoch']:.2f} s"),
            ("time of a step", f"{cost['milliseconds_per_step']:.2f} ms"),
            ("time of the run", f"{cost['seconds_total']:.1f} s"),
            ("peak memory", f"{cost['peak_memory_mib']:.0f} MiB"),
            ("before the model was loaded", f"{cost['baseline_memory_mib']:.0f} MiB"),
            ("classes compared in a step", f"{metrics['kept_classes']:.1f} of {metrics['classes']['base']}"),
            ("trained parameters", f"{metrics['parameters']['trained']:,} of {metrics['parameters']['all']:,}"),
            ("device", f"{cost['device']}, {config.precision}"),
        )
    )
    unfinished = "" if metrics["status"] == "complete" else f" – {metrics['status']} after {metrics['epochs']} epochs"
    title = html.escape(f"{config.model} on {config.data}, {config.method}, {config.shots} shots{unfinished}")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>
<h1>{title}</h1>
<table><tr><th>accuracy</th><th>zero-shot</th><th>tuned</th><th></th></tr>{accuracy}</table>
{_curves(rows, zero_shot)}
<h2>Cost</h2><table>{costs}</table>
{_gallery(examples)}
<details><summary>Settings</summary><pre>{html.escape(config.to_yaml())}</pre></details>
</html>
"""


def _verdict(better: bool) -> str:
    return "better" if better else "worse"


def _curves(rows: list[dict[str, Any]], zero_shot: dict[str, float]) -> str:
    """Loss and accuracy over the epochs, as SVG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["loss"] for row in rows], marker="o", color=_LOSS)
    left.set_title("training loss")
    for key, colour in (("base", _BASE), ("new", _NEW)):
        values = [zero_shot[key], *(row["accuracy"][key] for row in rows)]
        right.plot([0, *epochs], values, marker="o", color=colour, label=key)
        right.axhline(zero_shot[key], color=colour, linestyle=":", linewidth=1)
    right.set_title("test accuracy, % (dotted: zero-shot)")
    right.legend(frameon=False, labelcolor=_GREY)
    for axes in (left, right):
        axes.set_xlabel("epoch", color=_GREY)
        axes.title.set_color(_GREY)
        axes.tick_params(colors=_GREY)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.patch.set_alpha(0)
        for spine in axes.spines.values():
            spine.set_color(_GREY)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _gallery(examples: list[Example]) -> str:
    """Images that tuning mended or broke."""
    sections = []
    for split in ("base", "new"):
        figures = []
        for example in (example for example in examples if example.split == split):
            buffer = io.BytesIO()
            example.image.save(buffer, format="png")
            source = base64.b64encode(buffer.getvalue()).decode()
            answers = "".join(
                f'<br>{when}: <span class="{_verdict(said == example.label)}">{html.escape(said)}</span>'
                for when, said in (("zero-shot", example.zero_shot), ("tuned", example.tuned))
            )
            name = html.escape(example.label)
            figures.append(
                f'<figure><img alt="{name}" src="data:image/png;base64,{source}">'
                f"<figcaption><b>{name}</b>{answers}</figcaption></figure>"
            )
        if figures:
            sections.append(
                f"<h2>What tuning mended and broke, {split} classes</h2><div class='examples'>{''.join(figures)}</div>"
            )
    return "".join(sections)
