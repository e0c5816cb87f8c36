"""Page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..config import TuneConfig
from ..data import InputError
from ..train import predictions
from ..train.class_metrics import VALIDATION, accuracy_rows, largest_class, metrics_of_test
from ..train.notes import demonstration_note
from ..train.predictions import TestPredictions, TopClasses
from ..train.run_folder import CONFIG, EPOCHS, read_metrics
from ..untrusted import parse_object, read_bounded
from . import page
from .dot_plot import DotRow, dot_plot, plot_of_changes
from .intervals import range_text, wilson
from .mistakes import changed, class_results, confused_pairs, confusion_matrix, one_per_class
from .page import Cell, Section, Table, row
from .plots import accuracy_svg, blend_svg, coloured, finite, loss_svg
from .rendering import number, part, plural
from .words import name_of_run, name_of_test, title_of

_LARGEST = 1 << 28  # bytes of metrics.jsonl
_FEW = 100  # validation images, of which one is more than 1 %


def report_html(
    config: TuneConfig, metrics: Mapping[str, Any], rows: list[dict[str, Any]], tests: Sequence[TestPredictions]
) -> str:
    """Return the page, from metrics.json, metrics.jsonl and the predictions; missing metrics are left out or a dash."""
    environment = metrics.get("environment") or {}
    fixed = "Test images that only the tuned model classifies correctly, with its three most probable classes."
    broken = "Test images that only the zero-shot model classified correctly."
    return page.page_html(
        _title(config, metrics),
        str(environment.get("finished", "")),
        _headline(metrics),
        [*_notes(config, metrics), *_results(metrics), *_candidates(metrics)],
        [
            Section("fixed", "Fixed by tuning", _galleries(tests, 0, fixed, "better")),
            Section("broken", "Broken by tuning", _galleries(tests, 1, broken, "worse")),
            Section("classes", "Classes", page.groups({name_of_test(test.name): _classes(test) for test in tests})),
            Section("confusions", "Confusions", _confusions(tests)),
            Section("thresholds", "Thresholds", _thresholds(metrics.get("validation") or {})),
            Section("training", "Training", _curves(metrics, rows)),
            page.reproduction(metrics.get("command", ""), _data(config, metrics), environment, config.to_yaml()),
            Section("cost", "Cost", _cost(config, metrics)),
        ],
    )


def run_report(folder: Path) -> str:
    """Return the page of a run that has ended; without predictions, it has neither classes nor images."""
    # Nothing that the file names is loaded.
    config, metrics = TuneConfig.from_yaml(folder / CONFIG, trust=True), read_metrics(folder)
    path = folder / predictions.PREDICTIONS
    tests = predictions.load(path) if path.exists() else []
    return report_html(config, metrics, _epochs(folder / EPOCHS), tests)


def _epochs(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_object(line, finite=False) for line in read_bounded(path, _LARGEST).splitlines()]
    except FileNotFoundError:  # a method without epochs
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}).") from error


# ---- the first screen --------------------------------------------------------------------------------------------


def _title(config: TuneConfig, metrics: Mapping[str, Any]) -> str:
    blended = [f"blended at {metrics['alpha']:g}"] if "alpha" in metrics else []
    title = title_of(config, _chosen(metrics) or name_of_run(config), *blended)
    if metrics["status"] == "complete":
        return title
    return f"{title} · {metrics['status']} after {plural(metrics['epochs'], 'epoch')}"


def _headline(metrics: Mapping[str, Any]) -> str:
    zero_shot, tuned = metrics["zero_shot"], metrics["tuned"] or {}
    first, *others = metrics["classes"]
    if not metrics.get("images", {}).get("tests", {}).get(first, 1):
        held = metrics.get("validation")
        if not held or not (finite(held["zero_shot"]) and finite(held["tuned"])):
            return "All images trained, none were kept for a test: there is no accuracy."
        kind, before, after, rest = _leading(metrics, VALIDATION, held["zero_shot"], held["tuned"])
        what = "the candidate" if metrics.get("candidates") else "the epoch"
        return (
            f"No images were kept for a test. On {plural(held['images'], 'validation image')}, which choose {what}, "
            f"the {kind} went {_from_to(before, after)}{rest}; expect less on other images."
        )
    classes = _counted(metrics, first)
    if not (finite(zero_shot.get(first)) and finite(tuned.get(first))):
        return f"No accuracy after tuning; zero-shot {_percent(zero_shot.get(first))} on the {classes}."
    subject = _chosen(metrics) or ("Tuning and blending" if "alpha" in metrics else "Tuning")
    kind, before, after, rest = _leading(metrics, first, zero_shot[first], tuned[first])
    verb = "kept" if after == before else "raised" if after > before else "lowered"
    text = f"{subject} {verb} the {kind} on the {classes} {_from_to(before, after)}{rest}"
    if len(others) == 1 and finite(zero_shot.get(others[0])) and finite(tuned.get(others[0])):
        before, after = zero_shot[others[0]], tuned[others[0]]
        verb = "stayed" if after == before else "rose" if after > before else "fell"
        text += f". On the {_counted(metrics, others[0])} it {verb} {_from_to(before, after)}"
        text += _interval(metrics, others[0], after)
    elif finite(zero_shot.get("targets")) and finite(tuned.get("targets")):
        text += f". On the {len(others)} targets the mean went {_from_to(zero_shot['targets'], tuned['targets'])}"
    return f"{text}."


def _leading(metrics: Mapping[str, Any], test: str, before: float, after: float) -> tuple[str, float, float, str]:
    """Kind of accuracy that leads, with its values and the rest of the sentence: the interval of the accuracy.

    If classes differ in size, the balanced accuracy leads, and the rest has the accuracy.
    """
    interval = _interval(metrics, test, after, "95 % interval ")
    found = [(metrics.get(part) or {}).get(test) for part in ("zero_shot_by_class", "by_class")]
    largest = largest_class(found[0])
    if largest is None or not all(of and finite(of["balanced_accuracy"]) for of in found):
        return "accuracy", before, after, interval
    name, share = largest
    rest = f". The accuracy, which is {_percent(share)} if the answer is always {name}, went {_from_to(before, after)}"
    return "balanced accuracy", *(of["balanced_accuracy"] for of in found if of), rest + interval


def _percent(value: float | None) -> str:
    return number(value, ".1f", "\N{NO-BREAK SPACE}%")


def _from_to(before: float, after: float) -> str:
    return f"at {_percent(after)}" if after == before else f"from {_percent(before)} to {_percent(after)}"


def _images(metrics: Mapping[str, Any], test: str) -> int | None:
    """Number of images of a test, or of validation."""
    if test == VALIDATION:
        return (metrics.get("validation") or {}).get("images")
    return ((metrics.get("images") or {}).get("tests") or {}).get(test)


def _interval(metrics: Mapping[str, Any], test: str, accuracy: float, name: str = "") -> str:
    images = _images(metrics, test)
    return f" ({name}{range_text(wilson(accuracy, images))})" if images else ""


def _counted(metrics: Mapping[str, Any], test: str) -> str:
    """Name of a test with the number of its classes, or of a summary."""
    count = metrics["classes"].get(test)
    if count is None:
        return name_of_test(test)
    kind = "trained " if test == next(iter(metrics["classes"])) else "new " if test == "new" else ""
    classes = plural(count, f"{kind}class", f"{kind}classes")
    return classes if test in ("base", "new", "all") else f"{classes} of {test}"


def _notes(config: TuneConfig, metrics: Mapping[str, Any]) -> list[Markup]:
    """The epoch that is kept, and notes. A run that was stopped keeps the weights of its last epoch."""
    found: list[Markup] = []
    best, validation = metrics.get("best_epoch"), metrics.get("validation") or {}
    if best is not None and metrics["status"] == "complete" and "alpha" not in metrics:
        accuracy = f" ({_percent(validation['tuned'])})" if finite(validation.get("tuned")) else ""
        if finite(validation.get("balanced")):  # epochs are compared by it
            accuracy = f" (balanced accuracy {_percent(validation['balanced'])})"
        images = plural(validation["images"], "validation image") if validation.get("images") else "validation images"
        found.append(part("text", f"Epoch {best} of {metrics['epochs']} is kept, the best on {images}{accuracy}."))
    if (demonstration := demonstration_note(config.model)) is not None:
        found.append(part("text", demonstration, "warning" if config.own_data else "quiet"))
    return found + [part("text", note, "warning") for note in metrics.get("notes", ())]


def _results(metrics: Mapping[str, Any]) -> list[Markup]:
    """Plot and table of the accuracies before and after tuning."""
    dots, rows = [], []
    for each in accuracy_rows(metrics):
        if each.test == VALIDATION and (each.label != VALIDATION or not finite(each.before)):
            continue
        name = _counted(metrics, each.test)
        images = _images(metrics, each.test) if each.label == each.test else None  # not balanced, nor always one class
        before, after = page.accuracy_cell(each.before, images), page.accuracy_cell(each.after, images)
        change = each.after - each.before if finite(each.before) and finite(each.after) else None
        summary = "summary" if each.test not in (*metrics["classes"], VALIDATION) else ""
        label = name + each.label.removeprefix(each.test)
        count = "" if images is None else f"{images:,}"
        rows.append(row(label, count, before, after, page.change_cell(change), style=summary))
        if images and finite(each.before) and each.test != VALIDATION:
            limits = [wilson(value, images) if finite(value) else None for value in (each.before, each.after)]
            tuned = each.after if finite(each.after) else None
            dots.append(DotRow(name, each.before, tuned, plural(images, "image"), *limits))
    plot = [part("dots", dot_plot("accuracy of each test, %", dots))] if len(dots) > 1 else []
    table = Table("accuracy, %", ["images", "zero-shot", "tuned", "change"], rows)
    text = (
        f"In brackets{' and as lines' if plot else ''}: 95 % intervals over the images (Wilson). Both models have the "
        "same images, so a change may be certain although intervals overlap."
    )
    return [*plot, table.html, part("text", text)]


def _chosen(metrics: Mapping[str, Any]) -> str | None:
    """Name of the candidate that was chosen, for the beginning of a sentence."""
    chosen = next((each["name"] for each in metrics.get("candidates") or () if each["chosen"]), None)
    return chosen and chosen[:1].upper() + chosen[1:]


def _candidates(metrics: Mapping[str, Any]) -> list[Markup]:
    """Table of the candidates of a run that chose its method, and why it chose."""
    found = metrics.get("candidates")
    if not found:
        return []
    balanced = any(number(each["balanced_accuracy"]) != number(each["accuracy"]) for each in found)
    rows = []
    for each in found:
        cells = [page.accuracy_cell(each["accuracy"], each["images"])]
        cells += [Cell(number(each["balanced_accuracy"]))] if balanced else []
        cells += [Cell(number(each["seconds"], ",.1f")), Cell("yes" if each["new_names"] else "no")]
        name, style = (f"✓ {each['name']}", "summary") if each["chosen"] else (each["name"], "")
        rows.append(row(name, *cells, style=style))
    columns = ["accuracy, %", *(["balanced accuracy, %"] if balanced else []), "seconds", "takes new names"]
    parts = [Table(f"candidates, on {plural(found[0]['images'], 'held-out image')}", columns, rows).html]
    if (chosen := _chosen(metrics)) is not None:
        because = f": {metrics['chosen_because']}" if metrics.get("chosen_because") else ""
        again = "" if found[0]["chosen"] else " Then it was trained again, on all images."  # the first is zero-shot
        parts.append(part("text", f"{chosen} was chosen{because}.{again}", ""))
    return parts


# ---- sections ----------------------------------------------------------------------------------------------------


def _galleries(tests: Sequence[TestPredictions], which: int, explained: str, style: str) -> list[Markup]:
    """Gallery of each test, of the images that tuning fixed (`which` 0) or broke (1)."""
    found: dict[str, list[Markup]] = {}
    for test in tests:
        chosen = changed(test)[which]
        indices, count = one_per_class(test.labels, chosen), int(chosen.sum())
        shown = f"{len(indices):,} of {count:,} images" if len(indices) < count else plural(count, "image")
        if indices:
            gallery = part("gallery", [_card(test, index) for index in indices], style)
            found[f"{name_of_test(test.name)}: {shown}"] = [gallery]
    return [part("text", explained), *page.groups(found)] if found else []


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


def _classes(test: TestPredictions) -> list[Markup]:
    """Plot and table of the classes of a test."""
    results = class_results(test)
    last = metrics_of_test(test.labels, test.last, test.classes)
    rows, dots = [], []
    for found, own in zip(results, last["classes"], strict=True):
        name = test.classes[found.label]
        dot = DotRow(name, found.zero_shot, found.tuned, plural(found.images, "image"))
        taken = "" if found.predicted is None else f"{test.classes[found.predicted]} ({found.errors})"
        cells: list[str | Cell] = [
            f"{found.images:,}",
            number(found.zero_shot),
            number(found.tuned),
            page.change_cell(dot.change),
        ]
        cells += [number(own["precision"]), number(own["f1"]), Cell(taken, style="left", order=found.errors)]
        rows.append(row(name, *cells))
        dots.append(dot)
    text = (
        f"Mean over the classes: accuracy {_percent(last['balanced_accuracy'])}, F1 {_percent(last['macro_f1'])}. "
        "Precision and F1 are those of the last model; predictions.csv has every image, confusion.csv every pair of "
        "classes."
    )
    columns = ["images", "zero-shot, %", "tuned, %", "change", "precision, %", "F1, %", "most often taken for"]
    # Of a single image per class, accuracies are 0 and 100 %.
    several = any(found.images > 1 for found in results)
    plot = [part("dots", plot_of_changes("accuracy of each class, %", dots))] if several else []
    return [*plot, part("text", text), Table("class", columns, rows, searched=True).html]


def _confusions(tests: Sequence[TestPredictions]) -> list[Markup]:
    """Matrix of confusions of each test, and the most frequent ones with images."""
    parts: dict[str, list[Markup]] = {}
    for test in tests:
        labels, counts = confusion_matrix(test)
        totals = test.labels.bincount(minlength=len(test.classes)).tolist()
        rows = [
            (test.classes[label], totals[label], [(count, count / max(totals[label], 1)) for count in of])
            for label, of in zip(labels, counts, strict=True)
        ]
        pairs = [
            {
                "label": test.classes[pair.label],
                "predicted": test.classes[pair.predicted],
                "count": pair.count,
                "total": pair.total,
                "image": test.thumbnails.get(pair.index),
                "other": None if pair.predicted_index is None else test.thumbnails.get(pair.predicted_index),
            }
            for pair in confused_pairs(test)
        ]
        if pairs:
            some = f"The {len(labels)} classes with the most errors: i" if len(labels) < len(test.classes) else "I"
            text = f"{some}mages of a class (row) by predicted class (column)."
            matrix = part("matrix", [test.classes[label] for label in labels], rows)
            parts[name_of_test(test.name)] = [part("text", text), matrix, part("pairs", pairs)]
    return page.groups(parts)


def _thresholds(validation: Mapping[str, Any]) -> list[Markup]:
    """Table of thresholds on the validation images, with a sentence for the first that leaves images out."""
    found, count = validation.get("thresholds"), validation.get("images")
    if not found or not count:
        return []
    text = "These thresholds keep all validation images."
    first = next((each for each in found if finite(each["threshold"]) and each["coverage"] < 100), None)
    if first is not None:
        kept, right = (number(first[name], ".0f", "\N{NO-BREAK SPACE}%") for name in ("coverage", "accuracy"))
        text = f"At {first['threshold']:.2f}, {kept} of the validation images are kept, of which {right} are right."
    few = f"; they are few, one is {_percent(100 / count)}" if count < _FEW else ""
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
    """Plots of loss, accuracy, and the blend."""
    blend = metrics.get("blend")
    colours, of_blend = coloured(metrics["classes"]), coloured(blend["accuracy"]) if blend else {}
    dashed = "dashed: validation, " if any(finite(each.get("validation")) for each in rows) else ""
    accuracy = accuracy_svg(rows, metrics["zero_shot"], colours, metrics.get("best_epoch"))

    def legend(names: Mapping[str, str]) -> dict[str, str]:
        return {name_of_test(name): colour for name, colour in names.items()}

    found = [
        ("training loss; thin: means of consecutive steps", loss_svg(rows), {}),
        (f"test accuracy, % ({dashed}dotted: zero-shot)", accuracy, legend(colours)),
        (
            "accuracy of weights between zero-shot and tuned, %",
            blend_svg(blend, of_blend) if blend else "",
            legend(of_blend),
        ),
    ]
    found = [(title, svg, names) for title, svg, names in found if svg]
    return [part("figures", found)] if found else []


def _cost(config: TuneConfig, metrics: Mapping[str, Any]) -> list[Markup]:
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
            "checkpoint": number(metrics.get("checkpoint", {}).get("mib"), ",.1f", " MiB"),
            "device": f"{cost['device']}, {config.precision}",
        }
    )


def _data(config: TuneConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Data and seed, for the section that says how to reproduce the run."""
    images = metrics.get("images") or {}
    counts = [plural(images["train"], "training image")] if "train" in images else []
    counts += [
        f"{plural(count, 'image')} of {name_of_test(name)}" for name, count in (images.get("tests") or {}).items()
    ]
    known = [config.data, metrics.get("protocol") or "", ", ".join(counts)]
    return {"data": "; ".join(filter(None, known)), "seed": config.seed}
