"""The choice between candidates: what is compared, chosen, trained again on all images, and resumed."""

from __future__ import annotations

import dataclasses
import shutil
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.report.words import name_of_run
from skipkernels.app.results.files import read_metrics
from skipkernels.app.train import candidates, evaluate_run, search, tune
from skipkernels.app.train.candidates import FACTORS, Candidate
from skipkernels.app.train.search import Search, Trial, held_out_masks
from skipkernels.app.train.setup import build_run
from tests.app.runs import at_step, files, interrupt, results, small, stopped

TINY = small(None, method="auto").resolved()
AUTO = {"method": "auto", "epochs": 1, "max_classes": 12, "protocol": "few-shot"}

HEADS = ["", " + anchored probe", " + Gaussian head", " + linear probe"]
FROZEN = ["zero-shot", *(f"frozen{head}" for head in HEADS[1:])]


def trained(*factors: str) -> list[str]:
    """Names of the candidates that are trained with these factors of the learning rates."""
    return [f"Skip Tuning{factor}{blend}{head}" for factor in factors for blend in ("", ", blended") for head in HEADS]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "run"
    return folder, tune(small(folder, **AUTO))


def search_of(**changes) -> Search:
    setup = build_run(small(None, **AUTO | changes).resolved())
    features = setup.train_features()
    return Search(setup, features, setup.examples(features))


def winning(monkeypatch, chosen):
    """Let the first candidate win for which `chosen` returns True; before there is one, the last."""

    def best(trials):
        return next((trial for trial in trials if chosen(trial.candidate)), trials[-1]), 0

    monkeypatch.setattr(search, "best", best)


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_the_best_candidate_is_chosen(run):
    folder, metrics = run
    rows = metrics["candidates"]
    assert sorted(row["name"] for row in rows) == sorted(FROZEN + trained("", " ×3", " ×10"))
    assert {row["images"] for row in rows} == {24}
    assert [row["chosen"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert rows == sorted(rows, key=lambda row: (-row["accuracy"], row["loss"])), "the best first"
    chosen = rows[0]
    assert metrics["chosen_because"].startswith("highest accuracy on 24 held-out images")
    assert metrics["validation"]["tuned"] == pytest.approx(chosen["accuracy"], abs=1e-4)
    assert metrics["images"]["train"] == 24, "the held-out images train in the end"
    assert evaluate_run(folder) == metrics["tuned"]
    assert sk.Classifier.load(folder, device="cpu").calibrated


@pytest.mark.parametrize(("rights", "chosen", "equal"), [([12, 15, 13], 1.0, 0), ([12, 15, 15], 1.0, 1)])
def test_of_equal_candidates_that_with_the_lowest_loss_is_chosen(rights, chosen, equal):
    """The first `rights` of 24 held-out images are right; the last has larger logits, also wrong ones."""
    trials, labels = [], torch.zeros(24, dtype=torch.int64)
    for factor, right in zip((None, 1.0, 3.0), rights, strict=True):
        logits = torch.eye(2)[(torch.arange(24) >= right).long()] * (2 if factor == 3 else 1)
        trials.append(Trial.scored(Candidate(TINY, factor, head="anchored"), logits, labels))
    found, others = search.best(trials)
    assert (found.candidate.factor, others) == (chosen, equal)
    assert found.row(24, chosen=True)["loss"] == round(found.loss, 6)


def test_the_chosen_run_is_that_of_its_settings(run, tmp_path):
    """Equal bits of the weights and the head, trained with the settings of config.yaml alone, and the same name."""
    folder, metrics = run
    assert metrics["classifier"] == next(row["name"] for row in metrics["candidates"] if row["chosen"])
    assert main(["tune", "--config", str(folder / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert read_metrics(tmp_path / "again")["classifier"] == metrics["classifier"]
    for name in ("model.safetensors", "head.safetensors"):
        if (folder / name).exists():
            first, again = load_file(folder / name), load_file(tmp_path / "again" / name)
            assert first.keys() == again.keys() and all(first[key].equal(again[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "chosen", "settings", "by"),
    [
        ({"prior": "balanced"}, lambda c: c.head == "none" and c.factor == 1, {"head": "none", "prior": "images"},
         "balanced accuracy"),
        ({"blend": 0.5, "head": "anchored"}, lambda c: c.factor is None, {"epochs": 0, "blend": 1.0}, "accuracy"),
        ({"head": "anchored"}, lambda c: c.head == "none", {"head": "anchored"}, "accuracy"),  # only a comparison
    ],
    ids=["prior", "blend", "head"],
)  # fmt: skip
def test_a_choice_is_a_valid_configuration(tmp_path, monkeypatch, changes, chosen, settings, by):
    """It is read again, and keeps a head that is given."""
    winning(monkeypatch, chosen)
    metrics = tune(small(tmp_path / "run", **AUTO | changes))
    assert metrics["chosen_because"] == f"highest {by} on 24 held-out images"
    compared = [row[by.replace(" ", "_")] for row in metrics["candidates"][1:]]
    assert compared == sorted(compared, reverse=True), "behind the chosen one"
    config = TuneConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert {name: getattr(config, name) for name in settings} == settings
    assert evaluate_run(tmp_path / "run") == metrics["tuned"]


def test_the_head_of_a_given_method_is_chosen(tmp_path):
    metrics = tune(small(tmp_path / "run", **AUTO | {"method": "lora", "head": "auto"}))
    chosen, *others = [row["name"] for row in metrics["candidates"]]
    names = {"zero-shot", "LoRA", "LoRA + anchored probe", "LoRA + Gaussian head", "LoRA + linear probe"}
    assert {chosen, *others} == names and chosen == metrics["classifier"] != "zero-shot" and metrics["method"] == "lora"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["zero-shot", "frozen + anchored probe", "Skip Tuning ×3, blended + Gaussian head"]),
        ({"epochs": 0}, ["zero-shot", "frozen + anchored probe"]),
        ({"epochs": 0, "prior": "balanced"}, ["zero-shot", "frozen + anchored probe with equal priors"]),
        ({"head": "anchored"}, ["zero-shot", "frozen + anchored probe", "Skip Tuning ×3, blended + anchored probe"]),
        ({"method": "lora", "head": "auto"}, ["zero-shot", "LoRA + Gaussian head"]),
        ({"shots": 1}, []),
    ],
)
def test_where_new_classes_are_tested_the_accuracy_does_not_choose(changes, names):
    asked = search_of(protocol="base-to-new", **changes)
    assert [trial.candidate.name for trials in asked.run() for trial in trials] == names
    choice = asked.choice(stopped=False)
    name = name_of_run(dataclasses.replace(asked.config, **choice.settings))
    assert name == (names[-1] if names else "Skip Tuning ×3, blended + Gaussian head")
    assert not names or choice.because == "new classes are tested, and held-out images do not show what these lose"


def test_a_training_that_diverges_is_left_out(monkeypatch):
    monkeypatch.setattr(candidates, "FACTORS", (1.0, 1e30))
    of_skip = search_of(head="none")
    assert [[trial.candidate.name for trial in trials] for trials in of_skip.run()] == [
        ["zero-shot"],
        ["Skip Tuning", "Skip Tuning, blended"],
        [],
    ]
    assert of_skip.choice(stopped=False).settings["method"] == "skip"
    of_lora = search_of(method="lora", head="auto", image_lr=1e30, text_lr=1e30)
    list(of_lora.run())
    with pytest.raises(FloatingPointError, match="the training of every candidate diverged"):
        of_lora.choice(stopped=False)


# ---- held-out images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "given", "held_out"),
    [
        ([2] * 200, 0, [200]),  # a half of each, so that there are 200
        ([10] * 100, 0, [200]),
        ([1000] * 20, 0, [2000]),  # the most
        ([10] * 5000, 0, [5000]),  # more, since each class has one
        ([1] * 300 + [3] * 100, 0, [100]),  # a class with one image is not held out
        ([4] * 5, 0, [10, 10]),  # few
        ([1] * 50, 0, []),
        ([1] * 8, 3, [3]),
    ],
)
def test_held_out_masks(counts, given, held_out):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    masks = held_out_masks(labels, given)
    assert [int(mask.sum()) for mask in masks] == held_out
    for mask in masks:
        assert given or labels[~mask].unique().numel() == len(counts), "each class keeps a training image"


def test_trials_do_not_depend_on_each_other():
    """The last training, alone on a new model, has the accuracies and losses that it has after the others."""
    whole = search_of()
    before = {name: tensor.clone() for name, tensor in whole.setup.model.state_dict().items()}
    *_, last = whole.run()
    for name, tensor in whole.setup.model.state_dict().items():
        assert tensor.equal(before[name]), name
    alone = search_of()
    found = alone.tried([trial.candidate for trial in last])
    assert [(trial.accuracy, trial.loss) for trial in found] == [(trial.accuracy, trial.loss) for trial in last]


def test_a_val_split_chooses_and_then_trains(tmp_path):
    """The training images of few-shot, and those of the val split."""
    images = [(torch.rand(3, 32, 32), n % 3) for n in range(12)]
    metrics = tune(
        small(tmp_path / "run", **{"method": "auto", "epochs": 0, "max_classes": None}),
        dataset=images[:6],
        validation=images[6:9],
        test=images[9:],
        classes=["a", "b", "c"],
    )
    assert metrics["candidates"][0]["images"] == 3 and metrics["images"]["train"] == 9


@pytest.mark.parametrize(
    ("changes", "classifier", "epochs"),
    [
        ({}, "frozen + anchored probe", 0),
        ({"head": "none"}, "Skip Tuning", 1),
        ({"head": "gaussian"}, "frozen + Gaussian head", 0),
        ({"method": "lora", "head": "auto"}, "LoRA + anchored probe", 1),
    ],
)
def test_without_two_images_of_a_class_only_open_settings_are_chosen(tmp_path, changes, classifier, epochs):
    metrics = tune(small(tmp_path / "run", **AUTO | {"shots": 1} | changes))
    assert metrics["candidates"] == [] and metrics["classifier"] == classifier
    assert TuneConfig.from_yaml(tmp_path / "run" / "config.yaml").epochs == epochs == bool(metrics["steps"])
    assert metrics["chosen_because"].startswith("no class has two training images")


# ---- runs that are stopped, resumed or replaced ----------------------------------------------------------------------


def test_ctrl_c_keeps_the_best_so_far(tmp_path):
    console = Console(record=True, width=400)
    second = search_of().steps // len(FACTORS) + 3  # a step of the second training
    with at_step(second, interrupt):
        metrics = tune(small(tmp_path / "run", **AUTO), console)
    assert metrics["status"] == "complete"
    assert sorted(row["name"] for row in metrics["candidates"]) == sorted(FROZEN + trained(""))
    assert metrics["chosen_because"].endswith("of those before Ctrl-C")
    said = console.export_text()
    assert "candidates: on held-out training images" in said and "times 1, 3, 10" in said and "chosen: " in said


def test_sigterm_ends_the_comparison(tmp_path, capsys):
    arguments = ["--shots", "2", "--max-classes", "4", "--out", str(tmp_path / "run")]
    with at_step(1, lambda *args: signal.raise_signal(signal.SIGTERM)):
        assert main(["tune", *arguments]) == 128 + signal.SIGTERM
    assert "no epoch is complete" in capsys.readouterr().err and not (tmp_path / "run" / "candidates.json").exists()


def test_a_run_that_was_stopped_before_its_first_epoch_starts_again(tmp_path):
    changes = AUTO | {"head": "none"}
    stopped(tmp_path / "run", step=search_of(**changes).steps + 2, **changes)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "copy" / "candidates.json").unlink()
    assert tune(small(tmp_path / "run", **changes))["status"] == "complete"
    assert tune(resume=tmp_path / "copy")["candidates"] is None


def test_a_resumed_run_does_not_choose_again(tmp_path, monkeypatch):
    """Killed in the last training. The search of the second start would raise."""
    changes = AUTO | {"head": "anchored", "epochs": 2, "batch_size": 4}
    monkeypatch.setattr(candidates, "BLENDS", (1.0,))
    winning(monkeypatch, lambda candidate: candidate.factor is not None)
    tune(small(tmp_path / "whole", **changes))
    stopped(tmp_path / "cut", step=search_of(**changes).steps + 9, **changes)
    monkeypatch.setattr(Search, "run", None)
    tune(resume=tmp_path / "cut")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with pytest.raises(InputError, match="seed is 0 in the run in .*, and 1 here"):
        tune(resume=tmp_path / "cut", seed=1)


def test_a_choice_of_another_run_is_not_taken_over(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    config = dataclasses.replace(TuneConfig.from_yaml(copy / "config.yaml"), seed=1, out=copy, overwrite=True)
    metrics = tune(config)
    assert metrics["candidates"] is None and not (copy / "candidates.json").exists()


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "method", "head"),
    [
        ({}, "auto", "auto"),
        ({"data": "imagefolder:photos"}, "auto", "auto"),
        ({"data": "coop:oxford_pets"}, "skip", "none"),
        ({"preset": "reference"}, "skip", "none"),
        ({"method": "skip"}, "skip", "none"),
        ({"method": "skip", "head": "auto"}, "skip", "auto"),
        ({"method": "lora"}, "lora", "none"),
    ],
)
def test_auto_is_the_default_of_own_data_and_pictograms(settings, method, head):
    asked = TuneConfig(epochs=1, device="cpu", **settings)
    config = asked.resolved()
    assert (config.method, config.head) == (method, head) and config.out.name.endswith(f"-{method}")
    assert config.resolved() == config and config.out == asked.folder, "where the command line looks for the results"


@pytest.mark.parametrize("rates", [{}, {"text_lr": 1e-3}, {"text_lr": 2e-3, "image_lr": 1e-3}], ids=len)
def test_names_of_candidates_differ_and_are_those_of_their_runs(rates):
    asked = dataclasses.replace(TINY, **rates).resolved()
    found = [Candidate(asked, f, b, h) for f in (None, 1.0, 3.0) for b in (1.0, 0.5) for h in ("none", "probe")]
    assert len({each.name for each in found if each.factor or each.blend == 1}) == 10
    for each in found:
        assert name_of_run(dataclasses.replace(asked, **each.settings).resolved()) == each.name
