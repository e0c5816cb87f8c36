"""Heads of runs: the files, the classifier, evaluation, blends and new classes agree with the run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import skipkernels as sk
from skipkernels.app import heads
from skipkernels.app.data import InputError
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.train import evaluate_run, tune
from skipkernels.app.train.setup import build_task
from tests.app.runs import small

# Runs by the names of their classifiers: tuned, blended, of a method that adds weights, and of the pretrained model.
RUNS = {
    "Skip Tuning + anchored probe with equal priors": {"head": "anchored", "epochs": 1, "prior": "balanced"},
    "Skip Tuning, blended + Gaussian head": {"head": "gaussian", "epochs": 1, "blend": 0.5},
    "LoRA + linear probe": {"head": "probe", "epochs": 1, "method": "lora"},
    "frozen + anchored probe": {"head": "anchored", "epochs": 0},
}
TUNED, BLENDED, PROBE, FROZEN = RUNS
SCALE = pictogram_tiny.state_dict()["logit_scale"].exp()  # is not trained


class HeadRun(NamedTuple):
    folder: Path
    metrics: dict


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Callable[[str], HeadRun]:
    """Return a function that makes each of RUNS once."""

    @functools.cache
    def run(name: str) -> HeadRun:
        folder = tmp_path_factory.mktemp("head") / "run"
        return HeadRun(folder, tune(small(folder, **RUNS[name])))

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_a_head_is_read_as_it_was_tested(tuned, name):
    """`skipkernels eval`, and the probabilities of the classifier."""
    run = tuned(name)
    assert evaluate_run(run.folder) == run.metrics["tuned"]
    base = build_task(small(run.folder).resolved()).tests[0]
    found = sk.Classifier.load(run.folder, device="cpu").predict([image for image, _ in base.images], top=1)
    correct = (found.ids[:, 0] == torch.tensor(base.images.labels)).float().mean().item()
    assert 100 * correct == pytest.approx(run.metrics["tuned"]["base"], abs=1e-3)
    assert f" by {name}, not calibrated, cpu)" in repr(sk.Classifier.load(run.folder, device="cpu"))


@pytest.mark.parametrize("name", RUNS)
def test_the_head_is_that_of_the_saved_weights(tuned, name):
    """Fitted again to embeddings of the classifier that the folder has, with the penalty in metrics.json."""
    run, settings = tuned(name), RUNS[name]
    classifier = sk.Classifier.load(run.folder, device="cpu")
    images = build_task(small(run.folder).resolved()).train
    embedded = classifier.predict([image for image, _ in images], top=1).embeddings
    scale = SCALE.item()
    found = heads.Examples(embedded, torch.tensor(images.labels), classifier.class_embeddings(), scale)
    expected = heads.fit_head(
        settings["head"], found, run.metrics["l2"], equal_priors=settings.get("prior") == "balanced"
    )
    saved = load_file(run.folder / "head.safetensors")
    assert saved.keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():  # embeddings in other batches differ by rounding
        torch.testing.assert_close(saved[name], tensor, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [TUNED, BLENDED, FROZEN])
def test_new_classes_have_the_logits_of_their_texts(tuned, name):
    """Trained classes keep their head, in any order."""
    folder, images = tuned(name).folder, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained = sk.Classifier.load(folder, device="cpu")
    mixed = sk.Classifier.load(folder, classes=[trained.classes[1], "a violin", trained.classes[0]], device="cpu")
    logits = mixed.logits(images)
    torch.testing.assert_close(logits[:, [2, 0]], trained.logits(images)[:, :2], atol=1e-5, rtol=1e-5)
    of_text = SCALE * mixed.embed(images) @ mixed.class_embeddings()[1]
    torch.testing.assert_close(logits[:, 1], of_text.detach(), atol=1e-4, rtol=1e-5)
    assert "classes that were not trained are recognised by their names" in (folder / "README.md").read_text()


def test_a_linear_probe_refuses_new_classes(tuned):
    folder, _ = tuned(PROBE)
    trained = sk.Classifier.load(folder, device="cpu").classes[0]
    with pytest.raises(InputError, match="classes must be trained classes: a linear probe does not use texts"):
        sk.Classifier.load(folder, classes=[trained, "a violin"], device="cpu")
    assert "classes that were not trained are not recognised." in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", [TUNED, BLENDED])
def test_blend_fits_the_head_again(tuned, name, tmp_path):
    folder, metrics = tuned(name)
    blended = sk.blend(folder, 0.0, out=tmp_path / "blend")
    assert evaluate_run(tmp_path / "blend") == blended["tuned"]
    for test, curve in blended["blend"]["accuracy"].items():  # each with the head that is fitted to its weights
        assert (curve[0], curve[-1]) == (blended["tuned"][test], metrics["tuned"][test])


def test_blend_refuses_a_head_of_the_pretrained_model(tuned, tmp_path):
    folder, metrics = tuned(FROZEN)
    assert metrics["parameters"]["trained"] == 12 * (128 + 1)
    with pytest.raises(InputError, match="run must have tuned the weights of the model; it kept the pretrained"):
        sk.blend(folder, out=tmp_path / "blend")


def test_balanced_prior_raises_rare_classes():
    """Nine images of one class and one of another, both between their texts."""
    labels = torch.tensor([0] * 9 + [1])
    image = torch.nn.functional.normalize(torch.eye(2, dtype=torch.float64)[labels] + 0.8, dim=1)
    found = heads.Examples(image, labels, torch.eye(2, dtype=torch.float64), 5.0)
    for name in ("anchored", "gaussian", "probe"):
        plain, balanced = (heads.fit_head(name, found, 0.1, equal_priors=equal) for equal in (False, True))
        gain = [
            (head.logits(image) @ torch.tensor([-1.0, 1.0], dtype=torch.float64)).mean() for head in (plain, balanced)
        ]
        assert gain[1] > gain[0]
    assert heads.fit_head("none", found, 0.0) is None
