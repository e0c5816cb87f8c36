"""Page of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import TuneConfig
from ..data import InputError
from ..train import predictions
from ..train.class_metrics import VALIDATION, accuracy_rows, largest_class, metrics_of_test
from ..train.notes import demonstration_note
from ..train.predictions import TestPredictions, TopClasses
from ..train.run_folder import CONFIG, EPOCHS, read_metrics
from ..untrusted import parse_object, read_bounded
from .dot_plot import DotPlot, DotRow, dot_plot, with_one_axis
from .mistakes import changed, class_results, confused_pairs, confusion_matrix, count_changed
from .plots import accuracy_svg, blend_svg, coloured, finite, loss_svg
from .rendering import MISSING, facts, number, plural, render, svg

_SUMMARIES = {"harmonic": "harmonic mean", "targets": "mean of the targets"}
_LARGEST = 1 << 28  # bytes of metrics.jsonl
_FEW = 100  # validation images, of which one is more than 1 %
_TABLE_ROWS = 2000  # most classes in a table
_TOP_PLOTS = 2  # most tests with a plot of their classes at the top; of more tests, a row each is shown there


def report_html(
    config: TuneConfig, metrics: Mapping[str, Any], rows: list[dict[str, Any]], tests: Sequence[TestPredictions]
) -> str:
    """Return the page, from metrics.json, metrics.jsonl and the predictions; missing metrics are left out or a dash."""
    names = list(metrics["classes"])
    environment = metrics.get("environment") or {}
    return render(
        "run.html.j2",
        title=_title(config, metrics),
        date=str(environment.get("finished", ""))[:10],
        headline=_headline(metrics, names, tests),
        kept=_kept_epoch(metrics),
        notes=[note for note in (demonstration_note(config.model), *metrics.get("notes", ())) if note is not None],
        plots=_top_plots(metrics, names, tests),
        accuracy=_accuracy(metrics, names),
        tests=[_test(test) for test in tests],
        more_plots=[_class_plot(test) for test in tests] if len(names) > _TOP_PLOTS else [],
        thresholds=_thresholds(metrics.get("validation") or {}),
        curves=_curves(metrics, rows, coloured(names)),
        stages=_stages(rows),
        cost=_cost(config, metrics),
        command=metrics.get("command", ""),
        environment=_environment(config, metrics),
        settings=config.to_yaml(),
    )


def run_report(folder: Path) -> str:
    """Return the page of a run that has ended; without predictions, it has neither classes nor images."""
    # Nothing that the file names is loaded.
    config, metrics = TuneConfig.from_yaml(folder / CONFIG, trust=True), read_metrics(folder)
    path = folder / predictions.PREDICTIONS
    tests = predictions.load(path) if path.exists() else []
    return report_html(config, metrics, _rows(folder / EPOCHS), tests)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_object(line, finite=False) for line in read_bounded(path, _LARGEST).splitlines()]
    except FileNotFoundError:  # a method without epochs
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}).") from error


def _title(config: TuneConfig, metrics: Mapping[str, Any]) -> str:
    state = "" if metrics["status"] == "complete" else f" – {metrics['status']} after "
    state += plural(metrics["epochs"], "epoch") if state else ""
    blended = f", blended at {metrics['alpha']:g}" if "alpha" in metrics else ""
    return f"{config.model} on {config.data}, {config.method}, {config.shots_text}{blended}{state}"


def _headline(metrics: Mapping[str, Any], names: list[str], tests: Sequence[TestPredictions]) -> str:
    zero_shot, tuned = metrics["zero_shot"], metrics["tuned"] or {}
    first, *others = names
    before, after = zero_shot.get(first), tuned.get(first)
    if not metrics.get("images", {}).get("tests", {}).get(first, 1):
        held = metrics.get("validation")
        if not held or not (finite(held["zero_shot"]) and finite(held["tuned"])):
            return "All images trained, none were kept for a test: there is no accuracy."
        kind, before, after, more = _leading(metrics, VALIDATION, held["zero_shot"], held["tuned"])
        return (
            f"No images were kept for a test. On {plural(held['images'], 'validation image')}, which choose the epoch, "
            f"the {kind} went {_from_to(before, after)}; expect less on other images{more}."
        )
    if not (finite(before) and finite(after)):
        return f"No accuracy after tuning; zero-shot {_percent(before)} on {first}."
    classes = plural(metrics["classes"][first], "trained class", "trained classes")
    subject = "Tuning and blending" if "alpha" in metrics else "Tuning"
    kind, before, after, more = _leading(metrics, first, before, after)
    verb = "kept" if after == before else "raised" if after > before else "lowered"
    text = f"{subject} {verb} the {kind} on the {classes} {_from_to(before, after)}"
    found = next((class_results(test) for test in tests if test.name == first and test.tuned is not None), None)
    if found is not None:
        changes = [result.tuned - result.zero_shot for result in found if result.tuned is not None]
        better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
        text += f": {plural(better, 'class', 'classes')} better, {worse:,} worse"
        if more and (never := sum(result.tuned == 0 for result in found)):
            text += f", {never:,} without a correct image"
    text += more
    if len(others) == 1 and finite(zero_shot.get(others[0])) and finite(tuned.get(others[0])):
        before, after = zero_shot[others[0]], tuned[others[0]]
        verb = "stayed" if after == before else "rose" if after > before else "fell"
        classes = plural(metrics["classes"][others[0]], f"{others[0]} class", f"{others[0]} classes")
        text += f". On the {classes} it {verb} {_from_to(before, after)}"
    elif finite(zero_shot.get("targets")) and finite(tuned.get("targets")):
        text += f". On the {len(others)} targets the mean went from {_percent(zero_shot['targets'])} to "
        text += _percent(tuned["targets"])
    return f"{text}."


def _leading(metrics: Mapping[str, Any], test: str, before: float, after: float) -> tuple[str, float, float, str]:
    """Kind of accuracy that leads, with its values, and what follows on the plain one if classes differ in size."""
    found = [(metrics.get(part) or {}).get(test) for part in ("zero_shot_by_class", "by_class")]
    largest = largest_class(found[0])
    if largest is None or not all(of and finite(of["balanced_accuracy"]) for of in found):
        return "accuracy", before, after, ""
    name, share = largest
    more = f". The accuracy, which is {_percent(share)} if the answer is always {name}, went {_from_to(before, after)}"
    return "balanced accuracy", *(of["balanced_accuracy"] for of in found if of), more


def _percent(value: float | None) -> str:
    return number(value, ".1f", "\N{NO-BREAK SPACE}%")


def _from_to(before: float, after: float) -> str:
    return f"at {_percent(after)}" if after == before else f"from {_percent(before)} to {_percent(after)}"


def _kept_epoch(metrics: Mapping[str, Any]) -> str:
    """Sentence on the epoch that is kept, or "". A run that was stopped keeps the weights of its last epoch."""
    best, validation = metrics.get("best_epoch"), metrics.get("validation") or {}
    if best is None or metrics["status"] != "complete" or "alpha" in metrics:  # a blend has the accuracy of the blend
        return ""
    accuracy = f" ({_percent(validation['tuned'])})" if finite(validation.get("tuned")) else ""
    if finite(validation.get("balanced")):  # epochs are compared by it
        accuracy = f" (balanced accuracy {_percent(validation['balanced'])})"
    images = plural(validation["images"], "validation image") if validation.get("images") else "validation images"
    return f"Epoch {best} of {metrics['epochs']} is kept, the best on {images}{accuracy}."


def _top_plots(metrics: Mapping[str, Any], names: list[str], tests: Sequence[TestPredictions]) -> list[DotPlot]:
    # Of a single image per class, accuracies are 0 and 100 %.
    if len(names) <= _TOP_PLOTS and any(found.images > 1 for test in tests for found in class_results(test)):
        return with_one_axis([_class_plot(test) for test in tests])
    rows = [
        DotRow(name, before, after if finite(after) else None, plural(metrics["classes"][name], "class", "classes"))
        for name in names
        if finite(before := metrics["zero_shot"].get(name))
        for after in ((metrics["tuned"] or {}).get(name),)
    ]
    return [dot_plot("accuracy of each test", rows, by_change=False)]


def _class_plot(test: TestPredictions) -> DotPlot:
    rows = [
        DotRow(test.classes[found.label], found.zero_shot, found.tuned, plural(found.images, "image"))
        for found in class_results(test)
    ]
    return dot_plot(f"{test.name}: {plural(len(rows), 'class', 'classes')}", rows)


def _accuracy(metrics: Mapping[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Rows of the table of accuracies before and after tuning."""
    found = []
    for row in accuracy_rows(metrics):
        if row.test == VALIDATION and not finite(row.before):
            continue
        change = row.after - row.before if finite(row.before) and finite(row.after) else None
        label = _SUMMARIES.get(row.label, row.label) + (", trained on" if row.label == names[0] else "")
        summary = row.test not in (*names, VALIDATION)
        found.append(
            {"name": label, "before": row.before, "after": row.after, "change": change, "summary": summary}
            | {"classes": metrics["classes"].get(names[0] if row.test == VALIDATION else row.test)}
            | {"verdict": "" if not change else "better" if change > 0 else "worse"}
        )
    return found


def _test(test: TestPredictions) -> dict[str, Any]:
    """Galleries, table of classes and confusions of a test."""
    fixed, broken = changed(test)
    results = class_results(test)
    last = metrics_of_test(test.labels, test.last, test.classes)
    shown = sorted(
        zip(results, last["classes"], strict=True), key=lambda pair: -abs((pair[0].tuned or 0.0) - pair[0].zero_shot)
    )
    labels, counts = confusion_matrix(test)
    totals = test.labels.bincount(minlength=len(test.classes)).tolist()
    return {
        "name": test.name,
        "fixed": [_card(test, index) for index in fixed],
        "broken": [_card(test, index) for index in broken],
        "shown": dict(zip(("fixed", "broken"), map(_shown, (fixed, broken), count_changed(test)), strict=True)),
        "classes": [
            {
                "name": test.classes[found.label],
                "images": found.images,
                "before": found.zero_shot,
                "after": found.tuned,
                "change": None if found.tuned is None else found.tuned - found.zero_shot,
                "precision": own["precision"],
                "f1": own["f1"],
                "predicted": None if found.predicted is None else test.classes[found.predicted],
                "errors": found.errors,
            }
            for found, own in sorted(shown[:_TABLE_ROWS], key=lambda pair: pair[0].label)
        ],
        "all_classes": len(results),
        "balanced": last["balanced_accuracy"],
        "macro_f1": last["macro_f1"],
        "matrix": [
            (test.classes[label], totals[label], [(count, count / max(totals[label], 1)) for count in row])
            for label, row in zip(labels, counts, strict=True)
        ],
        "columns": [test.classes[label] for label in labels],
        "pairs": [
            {
                "label": test.classes[pair.label],
                "predicted": test.classes[pair.predicted],
                "count": pair.count,
                "total": pair.total,
                "image": test.thumbnails.get(pair.index),
                "other": None if pair.predicted_index is None else test.thumbnails.get(pair.predicted_index),
            }
            for pair in confused_pairs(test)
        ],
    }


def _shown(indices: list[int], count: int) -> str:
    """Number of images in a gallery, with the number of all if they are more."""
    return f"{len(indices):,} of {count:,}, one per class" if len(indices) < count else plural(count, "image")


def _card(test: TestPredictions, index: int) -> dict[str, Any]:
    """Image with the classes that were predicted before and after tuning, and their probabilities."""
    label = int(test.labels[index])

    def listed(top: TopClasses | None) -> list[dict[str, Any]]:
        if top is None:
            return []
        pairs = zip(top.classes[index].tolist(), top.probabilities[index].tolist(), strict=True)
        return [
            {"name": test.classes[found], "probability": value if finite(value) else None, "correct": found == label}
            for found, value in pairs
        ]

    return {
        "label": test.classes[label],
        "image": test.thumbnails.get(index),
        "predictions": [("zero-shot", listed(test.zero_shot)), ("tuned", listed(test.tuned))],
    }


def _thresholds(validation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Table of thresholds on the validation images, with a sentence for the first that leaves images out."""
    rows, count = validation.get("thresholds"), validation.get("images")
    if not rows or not count:
        return None
    text = "These thresholds keep all validation images."
    row = next((row for row in rows if finite(row["threshold"]) and row["coverage"] < 100), None)
    if row is not None:
        kept, right = (number(row[name], ".0f", "\N{NO-BREAK SPACE}%") for name in ("coverage", "accuracy"))
        text = f"At {row['threshold']:.2f}, {kept} of the validation images are kept, of which {right} are right."
    few = f"; they are few, one is {_percent(100 / count)}" if count < _FEW else ""
    return {"rows": rows, "text": f"{text} Measured on {plural(count, 'validation image')}{few}."}


def _curves(metrics: Mapping[str, Any], rows: list[dict[str, Any]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Plots of loss, accuracy, and the blend."""
    blend = metrics.get("blend")
    legend = list(colours.items())
    of_blend = coloured(blend["accuracy"]) if blend else {}
    dashed = " (dashed: validation, dotted: zero-shot)" if any(finite(row.get("validation")) for row in rows) else ""
    curves: tuple[tuple[str, str, list[tuple[str, str]]], ...] = (
        ("training loss; thin: means of consecutive steps", loss_svg(rows), []),
        (
            f"test accuracy, %{dashed or ' (dotted: zero-shot)'}",
            accuracy_svg(rows, metrics["zero_shot"], colours, metrics.get("best_epoch")),
            legend,
        ),
        (
            "accuracy of weights between zero-shot and tuned, %",
            blend_svg(blend, of_blend) if blend else "",
            list(of_blend.items()),
        ),
    )
    return [{"title": title, "svg": svg(found), "legend": below} for title, found, below in curves if found]


def _stages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time by stage of all epochs, and its share."""
    seconds: Counter[str] = Counter()
    for row in rows:
        seconds.update(row.get("stage_seconds") or {})
    colours = coloured(seconds)
    return [
        {
            "name": name,
            "time": f"{part:,.2f} s",
            "share": f"{100 * part / seconds.total():.1f}",
            "colour": colours[name],
        }
        for name, part in seconds.items()
        if seconds.total()
    ]


def _cost(config: TuneConfig, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost, parameters, kept = metrics["cost"], metrics["parameters"], metrics["kept_classes"]
    trained_on, spec = next(iter(metrics["classes"].values())), ",.1f" if kept and kept % 1 else ",.0f"
    return facts(
        {
            "run": number(cost["seconds_total"], ",.1f", " s"),
            "epoch": number(cost["seconds_per_epoch"], ",.2f", " s"),
            "step": number(cost["milliseconds_per_step"], ",.2f", " ms"),
            "peak memory": number(cost["peak_memory_mib"], ",.0f", " MiB"),
            "memory before loading the model": number(cost["baseline_memory_mib"], ",.0f", " MiB"),
            "kept classes per step": number(kept, spec, f" of {trained_on:,}"),
            "trained parameters": f"{parameters['trained']:,} of {parameters['all']:,}",
            "checkpoint": number(metrics.get("checkpoint", {}).get("mib"), ",.1f", " MiB"),
            "device": f"{cost['device']}, {config.precision}",
        }
    )


def _environment(config: TuneConfig, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the box that says how to reproduce the run: data, seed, versions and machine."""
    images = metrics.get("images") or {}
    counts = [f"{plural(images['train'], 'training image')}"] if "train" in images else []
    counts += [f"{count:,} of {name}" for name, count in (images.get("tests") or {}).items()]
    environment = metrics.get("environment") or {}
    versions = environment.get("versions") or {}
    return facts(
        {
            "data": "; ".join([config.data, metrics.get("protocol") or MISSING, ", ".join(counts)]).strip("; "),
            "seed": config.seed,
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "machine": environment.get("machine"),
            "date": environment.get("finished"),
        }
    )
