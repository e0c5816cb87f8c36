"""Page of a run: the result on the first screen, then sections from images to cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..config import CONFIG, TuneConfig
from ..data import InputError
from ..data.tasks import VALIDATION
from ..results.files import METRICS, PREDICTIONS, read_epochs, read_metrics
from ..results.notes import demonstration_note
from ..results.predictions import TestPredictions, load
from . import page
from .formats import finite, number, percent, plural
from .mistakes import broken, fixed
from .page import Cell, Section, Table, part, row
from .plots import accuracy_svg, coloured, loss_svg
from .predicted import classes, confusions, galleries
from .summary import accuracy_rows, classifier, counted, headline, held_out_accuracy, images_of, title
from .words import name_of_test

BEST = 5
"""Candidates that are shown at first."""
_FEW = 100  # validation images, of which one is more than 1 %
_INTERVALS = (
    "In brackets: 95 % intervals over the images (Wilson). Both models have the same images, so a change may be "
    "certain although intervals overlap."
)


def report_html(
    config: TuneConfig, metrics: Mapping[str, Any], rows: list[dict[str, Any]], tests: Sequence[TestPredictions]
) -> str:
    """Return the page, from metrics.json, metrics.jsonl and the predictions."""
    only_tuned = "Test images that only the tuned model classifies correctly, with its three most probable classes."
    if metrics["validation"] is not None:
        only_tuned += " Probabilities are not calibrated; those of predict and of the thresholds are."
    only_before = "Test images that only the zero-shot model classified correctly."
    return page.page_html(
        title(config, metrics),
        metrics["environment"]["finished"],
        headline(metrics),
        [*_notes(config, metrics), accuracy_table(metrics).html, part("text", _INTERVALS), *_candidates(metrics)],
        [
            Section("fixed", "Fixed by tuning", galleries(tests, fixed, only_tuned, "better")),
            Section("broken", "Broken by tuning", galleries(tests, broken, only_before, "worse")),
            Section("classes", "Classes", page.groups({name_of_test(test.name): classes(test) for test in tests})),
            Section("confusions", "Confusions", confusions(tests)),
            Section("thresholds", "Thresholds", _thresholds(metrics["validation"])),
            Section("training", "Training", _curves(metrics, rows)),
            page.reproduction(metrics["command"], _data(config, metrics), metrics["environment"], config.to_yaml()),
            Section("cost", "Cost", [cost_table(config, metrics).html]),
        ],
    )


def run_report(folder: Path) -> str:
    """Return the page of a complete run, from its files; without predictions, it has neither classes nor images."""
    # Nothing that the file names is loaded.
    config, metrics = TuneConfig.from_yaml(folder / CONFIG, trust=True), read_metrics(folder)
    tests = load(folder / PREDICTIONS) if (folder / PREDICTIONS).exists() else []
    try:
        return report_html(config, metrics, read_epochs(folder), tests)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / METRICS}: written by another version ({error!r}). Tune again.") from error


# ---- the first screen --------------------------------------------------------------------------------------------


def _notes(config: TuneConfig, metrics: Mapping[str, Any]) -> list[Markup]:
    """The epoch that is kept, and notes."""
    found = [part("text", text) for text in (kept_epoch(config, metrics),) if text is not None]
    if (demonstration := demonstration_note(config.model)) is not None:
        found.append(part("text", demonstration, "warning" if config.own_data else "quiet"))
    return found + [part("text", note, "warning") for note in metrics["notes"]]


def _candidates(metrics: Mapping[str, Any]) -> list[Markup]:
    """Table of the candidates of a run that chose its method, and why it chose."""
    if not metrics["candidates"]:
        return []
    found = [candidate_table(metrics, best=BEST).html, part("text", str(choice(metrics)), "")]
    if len(metrics["candidates"]) > BEST:
        found.append(
            part("group", f"All {len(metrics['candidates'])} candidates", [candidate_table(metrics).html], False)
        )
    return found


# ---- texts and tables, also of the terminal --------------------------------------------------------------------------


def kept_epoch(config: TuneConfig, metrics: Mapping[str, Any]) -> str | None:
    """Return which epoch is kept, and why; None for a run without validation images, or a blend."""
    best, validation = metrics["best_epoch"], metrics["validation"]
    if best is None or "alpha" in metrics:
        return None
    name, accuracy = held_out_accuracy(metrics, balanced=config.balances)
    images = plural(validation["images"], "validation image")
    return f"Epoch {best} of {metrics['epochs']} is kept, the best on {images} ({name} {percent(accuracy)})."


def choice(metrics: Mapping[str, Any]) -> str | None:
    """Return which candidate was chosen, and why; None if none was."""
    if not metrics["candidates"]:
        return None
    because = f": {metrics['chosen_because']}" if metrics["chosen_because"] else ""
    first = metrics["candidates"][0]  # zero-shot, which is not trained
    repeated = "was trained again, on" if metrics["steps"] else "was fitted again, to"
    again = "" if first["chosen"] else f" Then it {repeated} all images."
    return f"{classifier(metrics)} was chosen{because}.{again}"


def accuracy_table(metrics: Mapping[str, Any]) -> Table:
    """Table of the accuracies before and after tuning."""
    rows = []
    for each in accuracy_rows(metrics):
        if each.test == VALIDATION and (each.kind or not finite(each.before)):
            continue
        images = None if each.kind else images_of(metrics, each.test)
        if images == 0:
            continue
        before, after = page.accuracy_cell(each.before, images), page.accuracy_cell(each.after, images)
        change = each.after - each.before if finite(each.before) and finite(each.after) else None
        name = ", ".join(filter(None, [counted(metrics, each.test), each.kind]))
        style = "" if each.test in (*metrics["classes"], VALIDATION) else "summary"
        count = "" if images is None else f"{images:,}"
        rows.append(row(name, count, before, after, page.change_cell(change), style=style))
    return Table("accuracy, %", ["images", "zero-shot", "tuned", "change"], rows)


def candidate_table(metrics: Mapping[str, Any], best: int | None = None) -> Table:
    """Table of the candidates of a run that chose its method; of the first `best`, the chosen one before others."""
    found = metrics["candidates"]
    if best is not None and len(found) > best:
        found = sorted(found, key=lambda each: (each["chosen"], each["accuracy"]), reverse=True)[:best]
    balanced = any(number(each["balanced_accuracy"]) != number(each["accuracy"]) for each in found)
    rows = []
    for each in found:
        cells = [page.accuracy_cell(each["accuracy"], each["images"])]
        cells += [Cell(number(each["balanced_accuracy"]))] if balanced else []
        cells += [Cell(number(each["seconds"], ",.1f")), Cell("yes" if each["new_names"] else "no")]
        name, style = (f"✓ {each['name']}", "summary") if each["chosen"] else (each["name"], "")
        rows.append(row(name, *cells, style=style))
    columns = ["accuracy, %", *(["balanced accuracy, %"] if balanced else []), "seconds", "takes new names"]
    shown = f"the best {len(found)} of " if len(found) < len(metrics["candidates"]) else ""
    count = plural(len(metrics["candidates"]), "candidate")
    return Table(f"{shown}{count}, on {plural(found[0]['images'], 'held-out image')}", columns, rows)


def blend_table(metrics: Mapping[str, Any]) -> Table:
    """Table of the accuracies of weights between zero-shot (alpha 0) and tuned (1)."""
    curve = metrics["blend"]
    rows = [
        row(f"{alpha:g}", *map(number, values), style="summary" if alpha == curve["chosen"] else "")
        for alpha, *values in zip(curve["alphas"], *curve["accuracy"].values(), strict=True)
    ]
    fitted = "" if metrics["head"] in (None, "none") else ", with the head fitted to each"
    return Table(f"alpha{fitted}; accuracy, %", list(map(name_of_test, curve["accuracy"])), rows)


def cost_table(config: TuneConfig, metrics: Mapping[str, Any]) -> Table:
    """Table of times and sizes."""
    cost, parameters, kept = metrics["cost"], metrics["parameters"], metrics["kept_classes"]
    trained_on, spec = next(iter(metrics["classes"].values())), ",.1f" if kept and kept % 1 else ",.0f"
    return page.facts(
        {
            "run": number(cost["seconds_total"], ",.1f", " s"),
            "epoch": number(cost["seconds_per_epoch"], ",.2f", " s"),
            "step": number(cost["milliseconds_per_step"], ",.2f", " ms"),
            "peak memory": number(cost["peak_memory_mib"], ",.0f", " MiB"),
            "memory before loading the model": number(cost["baseline_memory_mib"], ",.0f", " MiB"),
            "kept classes per step": number(kept, spec, f" of {trained_on:,}"),
            "trained parameters": f"{parameters['trained']:,} of {parameters['all']:,}",
            "checkpoint": number(metrics["checkpoint"]["mib"], ",.1f", " MiB"),
            "device": f"{cost['device']}, {config.precision}",
        }
    )


# ---- sections ----------------------------------------------------------------------------------------------------


def _thresholds(validation: Mapping[str, Any] | None) -> list[Markup]:
    """Table of thresholds on the validation images, with a sentence for the first that leaves images out."""
    if validation is None or not validation["thresholds"]:
        return []
    found, count = validation["thresholds"], validation["images"]
    text = "These thresholds keep all validation images."
    first = next((each for each in found if finite(each["threshold"]) and each["coverage"] < 100), None)
    if first is not None:
        kept, right = (number(first[name], ".0f", " %") for name in ("coverage", "accuracy"))
        text = f"At {first['threshold']:.2f}, {kept} of the validation images are kept, of which {right} are right."
    few = f"; they are few, one is {percent(100 / count)}" if count < _FEW else ""
    rows = [
        row(
            f"{number(each['target'], '.0f')} % {'right' if each['wanted'] == 'accuracy' else 'kept'}",
            number(each["threshold"], ".2f"),
            number(each["coverage"]),
            number(each["accuracy"]),
        )
        for each in found
    ]
    use = "With skipkernels predict --threshold, an image with a smaller probability gets the label “none of these”."
    return [
        part("text", f"{text} Measured on {plural(count, 'validation image')}{few}.", ""),
        part("text", use),
        Table("wanted", ["threshold", "kept, %", "right, %"], rows).html,
    ]


def _curves(metrics: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[Markup]:
    """Plots of loss and accuracy, and the table of a blend."""
    colours = coloured(metrics["classes"])
    dashed = "dashed: validation, " if any(finite(each.get("validation")) for each in rows) else ""
    accuracy = accuracy_svg(rows, metrics["zero_shot"], colours)
    legend = {name_of_test(name): colour for name, colour in colours.items()}
    found = [
        ("training loss", loss_svg(rows), {}),
        (f"test accuracy, % ({dashed}dotted: zero-shot)", accuracy, legend),
    ]
    found = [(title, svg, names) for title, svg, names in found if svg]
    return [*([part("figures", found)] if found else []), *([blend_table(metrics).html] if "blend" in metrics else [])]


def _data(config: TuneConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Data and seed, for the section that says how to reproduce the run."""
    images = metrics["images"]
    counts = [plural(images["train"], "training image")]
    counts += [f"{plural(count, 'image')} of {name_of_test(name)}" for name, count in images["tests"].items()]
    return {"data": f"{config.data}; {metrics['protocol']}; {', '.join(counts)}", "seed": config.seed}
