"""bench.when, the study of docs/when.md and the tables of when-tables.md, when-details.md and heads.md (long tail)."""

from __future__ import annotations

import functools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.rows import latest_rows
from bench.when import accuracy, own, plan, runs, summary, tasks, trials
from bench.when.plan import best, reported
from bench.when.pool import run_missing
from bench.when.tasks import Shift
from recipes.pictograms import more
from skipkernels.app import heads
from skipkernels.app.demo.pictogram_tiny import RECIPES
from skipkernels.app.train.evaluation import Evaluator

BY_NAME = {shift.name: shift for shift in tasks.SHIFTS}
PACKAGED = [shift for shift in tasks.SHIFTS if shift.tasks]
SMALL = Shift("small", ("activities",))
SHORT = plan.Candidate("adamw", 1e-3, 1e-3, epochs=1, batch_size=64)
FITTED = plan.Candidate("fit", 0.0, 0.0)


# ---- names: zero-shot accuracies of docs/when.md are of names that no search has seen --------------------------------


@pytest.mark.parametrize("shift", PACKAGED, ids=lambda shift: shift.name)
def test_names_of_search_and_report_are_disjoint(shift):
    search, report = (set(tasks.names(shift, phase)) for phase in ("search", "report"))
    assert not search & report and 0 < 2 * len(search) < len(report)
    assert not search & {name for other in PACKAGED for name in tasks.names(other, "report")}


def test_known_and_unknown_words_are_all_names():
    known, unknown = (set(tasks.names(BY_NAME[f"{kind} words"], "report")) for kind in ("known", "unknown"))
    assert known | unknown == set(tasks.names(BY_NAME["all"], "report")) and not known & unknown
    assert "grinning cat" not in known, "cat is held out"


def test_source_draws_other_classes_for_other_seeds():
    first, again, other = (tasks.source(SMALL, "report", seed) for seed in (0, 0, 1))
    assert first.classes == again.classes != other.classes and {*first.classes} == {*other.classes}
    assert len(first.splits["train"]) == 2 * len(first.classes) == 2 * len(first.splits["test"])


@pytest.fixture
def drawings(tmp_path):
    """A file with 40 names of flags: two images of each to train on and one to test on, each of one color."""

    def pictures(colors):
        images = [np.full((64, 64, 3), color, np.uint8) for color in colors]
        return [more.Picture(f"name {i}", "set", image) for i, image in enumerate(images)]

    one, other, test = (pictures(colors) for colors in np.arange(120).reshape(3, 40))
    np.savez(tmp_path / more.FILE, **more.arrays("flags", {"train": one + other, "test": test}))
    return tmp_path / more.FILE


def test_source_reads_drawings_of_a_file(drawings):
    source = tasks.source(BY_NAME["flags"], "report", 0, drawings)
    report, search = (tasks.names(BY_NAME["flags"], phase, drawings) for phase in ("report", "search"))
    assert sorted(source.classes) == report and sorted(report + search) == sorted(f"name {i}" for i in range(40))
    assert len(source.splits["train"]) == 2 * len(report) == 2 * len(source.splits["test"])
    assert tasks.names(SMALL, "report", drawings) == tasks.names(SMALL, "report")
    for image, label in source.splits["test"]:
        assert (np.asarray(image) == 80 + int(source.classes[label].split()[1])).all()


# ---- runs: which settings, of which the tables of docs/when-details.md tell, are measured ----------------------------


def row(method, seed, value, phase="search", setting="adamw 0.001 0.001", **others):
    named = {"task": "all", "method": method, "phase": phase, "seed": seed, "setting": setting, "blended": 0} | others
    return {name: str(value) for name, value in (named | {"base": value, "new": value}).items()}


def rows_of_searches():
    """A row of each candidate."""
    of_each = [(name, candidate) for name, search in plan.SEARCHES.items() for candidate in search.candidates]
    return [row(name, 10, 1.0, setting=candidate.name) for name, candidate in of_each]


def test_best_setting_is_that_of_the_search():
    names = [candidate.name for candidate in plan.SEARCHES["full"].candidates]
    found = [
        row("full", seed, 10.0 * n + seed, setting=name) for n, name in enumerate(names) for seed in plan.SEARCH_SEEDS
    ]
    found += [row("full", 10, 999.0, setting=names[0], **others) for others in ({"blended": 1}, {"head": "anchored"})]
    found += [row("full", 0, 999.0, phase="report"), row("full", 10, 999.0, setting="a removed candidate")]
    assert best(found, "full").name == names[-1]


def test_reported_runs_have_every_omega():
    planned = list(reported(BY_NAME["all"], 0, rows_of_searches(), plan.SEARCHES))
    assert sorted(run.name for run in planned) == sorted(summary.METHODS)
    assert [run.config().skip_layers for run in planned[1:4]] == [0.25, 0.5, 0.75]
    configs = {run.name: run.config() for run in planned}
    assert configs["skip, K/C = 0.05"].keep_ratio == 0.05 and not configs["skip, image only"].train_text
    assert configs["skip, one class"].sampler == "class_pure" and configs["full"].method == "full"


def test_many_classes_leave_out_methods_that_take_hours():
    many = functools.partial(reported, BY_NAME["many classes"], 0, rows_of_searches())
    trained, measured = ({run.name for run in many(plan.SEARCHES, skip_slow=slow)} for slow in (True, False))
    assert measured - trained == {"full", "lora", "coop"} and "skip, K/C = 1" in trained
    epochs = {run.name: run.config().epochs for run in many(plan.SEARCHES)}
    assert epochs.pop("zero-shot") == epochs.pop("linear-probe") == 0 and {*epochs.values()} == {plan.MANY_EPOCHS}


def run_of(name, candidate, shift=SMALL):
    return plan.Run(shift, name, plan.EVERY[name], candidate, "report", 0)


def test_runs_without_a_row_are_executed_and_recorded_where_they_run(threads_for_workers, monkeypatch):
    torch.set_num_threads(3)
    old, new = (run_of(name, FITTED) for name in ("zero-shot", "linear-probe"))
    monkeypatch.setattr("bench.when.pool.latest_rows", lambda kind: [{**old.columns}])
    found = run_missing([old, new], "when", lambda run: [run.columns], save=False)
    assert [(row["method"], row["threads"]) for row in found[1:]] == [("linear-probe", "1")]


# ---- rows: accuracies of docs/when-tables.md, costs, steps and trials of docs/when-details.md ------------------------


@pytest.mark.parametrize(
    ("measure", "name", "setting", "expected"),
    [
        (runs.execute, "lora", SHORT, [{"blended": 0, "steps": 2}, {"blended": 1, "steps": 2}]),
        (runs.execute, "linear-probe", FITTED, [{"blended": 0, "new": None, "joint": None}]),
        (runs.execute, "auto", SHORT, [{"chosen": "Skip Tuning ×3, blended + Gaussian head"}]),
        (runs.curve, "skip, image only", SHORT, [{"epoch": 1}]),
        (runs.first_steps, "skip, label smoothing", SHORT, [{"batch_size": 64}]),
    ],
    ids=["blended", "probe", "chosen", "curve", "steps"],
)
def test_run_has_rows(measure, name, setting, expected, monkeypatch):
    monkeypatch.setitem(RECIPES, "skip", RECIPES["skip"] | {"epochs": 1})
    for found, columns in zip(measure(run_of(name, setting)), expected, strict=True):
        assert found.items() >= columns.items()


def test_blend_of_lora_has_half_of_its_update():
    """B is zero before tuning; half of A and B would be a quarter."""
    method = runs.setup_of(run_of("lora", plan.SEARCHES["lora"].candidates[0])).method
    found = runs.weights_of_a_blend(method)
    assert found and all(name.endswith(".lora_B") and not weight.any() for name, weight in found.items())


def test_heads_are_fitted():
    run = run_of("zero-shot", FITTED)
    by_head = {row["head"]: row for row in runs.execute(run)}
    plain = by_head.pop("")
    assert all(plain[name] == plain[f"zero_shot_{name}"] for name in accuracy.ACCURACIES)
    assert tuple(by_head) == plan.HEADS and by_head["anchored"]["l2"] in heads.CANDIDATES
    for row in by_head.values():
        assert row["base"] > plain["base"] and row["new"] == plain["new"], "new classes keep their texts"
    setup = runs.setup_of(run)
    theirs = Evaluator(setup, setup.test_features()).evaluate(setup.method).accuracies
    assert accuracy.rounded(theirs).items() <= plain.items()


def test_joint_accuracy_is_among_all_classes():
    """In one embedding per class, half of the new classes are nearest to a base class."""
    base = torch.eye(8)[:4]
    new = torch.cat([torch.eye(8)[4:6], base[:2]])
    method = SimpleNamespace(name="stub", train=lambda mode: None, embed=lambda x: x)
    method.logits_of = lambda test, image: image @ {"base": base, "new": new - 1e-3}[test].T
    tests = [SimpleNamespace(name=name, classes=list("abcd")) for name in ("base", "new")]
    setup = SimpleNamespace(task=SimpleNamespace(tests=tests, protocol="base-to-new"))
    caches = {
        name: SimpleNamespace(loader=lambda *_, x=x: [(x[:3], torch.arange(3)), (x[3:], torch.tensor([3]))])
        for name, x in (("base", base), ("new", new))
    }
    expected = {"base": 100.0, "new": 100.0, "harmonic": 100.0, "joint": 75.0}
    assert accuracy.accuracies(setup, method, caches) == expected


def test_trials_are_those_of_the_rows():
    found = [row["trial"] for name in (trials.NAME, trials.IMAGE_ONLY) for row in trials.execute(run_of(name, SHORT))]
    assert sorted(found) == sorted({row["trial"] for row in latest_rows("when_trials")})


# ---- own sets of images: docs/when-details.md, and the long tail of docs/heads.md ------------------------------------


def test_tail_has_a_large_class_and_small_ones():
    names = own.names_by_class()
    assert len(set(sum(names.values(), []))) == sum(map(len, names.values())), "a drawing has one class"
    labels = [label for _, label in own.drawn(own.TRAIN, seed=0)]
    assert [labels.count(label) for label in range(15)] == [200] + 14 * [5]
    (found,) = own.execute(own.OwnRun("long tail", "zero-shot", 0))
    rare = 14 * found["rare"] + found["large"]
    assert found["rare"] < 100 and 15 * found["balanced"] == pytest.approx(rare, abs=0.01)


def test_tiles_of_halves_do_not_overlap(monkeypatch, tmp_path):
    """The left half of each photograph is black, the right one white."""
    for file in own.PHOTOS.values():
        photo = Image.new("L", (40, 20))
        photo.paste(255, (20, 0, 40, 20))
        photo.save(tmp_path / file, "PNG")  # of any suffix: JPEG would mix the halves
    monkeypatch.setattr(own.resources, "files", lambda package: tmp_path)
    classes, train, test = own.tiles(own.OwnRun("tiles", "zero-shot", 0))
    for images, color in ((train, 0), (test, 255)):
        assert Counter(label for _, label in images) == dict.fromkeys(range(len(classes)), 8)
        assert {image.convert("L").getextrema() for image, _ in images} == {(color, color)}
    assert {run.task for run in own.planned(None, 1)} == {"long tail", "tiles"}


def test_flags_of_a_fourth_designer_have_the_classes_and_training_images_of_the_others(drawings):
    """Also where its file lacks a class."""
    with np.load(drawings) as file:
        arrays = {**file} | {key.replace("flags", more.FLAGPACK): array[1:] for key, array in file.items()}
    np.savez(drawings, **arrays)
    flags, flagpack = (own.flags(own.OwnRun(task, "zero-shot", 0, drawings)) for task in ("flags", more.FLAGPACK))
    assert flagpack[:2] == flags[:2] and flagpack[2] == flags[2][1:]
