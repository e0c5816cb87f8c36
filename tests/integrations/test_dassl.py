"""`integrations.dassl` in the stand-in for Dassl of bench/trainers/dassl.py, which is on no package index."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import pytest

from bench.trainers import dassl as runner
from bench.trainers.common import Problem, small_problem, trained

NAMES = [f"class_{n}" for n in range(12)]  # of the stand-in


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem(steps=6)


@pytest.fixture
def dassl() -> Iterator[Any]:
    """The module under test."""
    with runner.engine():
        import skipkernels.integrations.dassl as module

        yield module


def make(dassl: Any, problem: Problem, folder: Path, *, epochs: int = 1, save: bool = False, **options: Any) -> Any:
    """The registered trainer on glyph-tiny."""
    cfg = runner.config(folder, problem, **options)
    cfg.OPTIM.MAX_EPOCH, cfg.TRAIN.CHECKPOINT_FREQ = epochs, int(save)

    class Trainer(sys.modules["dassl.engine"].TRAINER_REGISTRY["SkipKernels"]):
        def load_clip(self) -> Any:
            return copy.deepcopy(problem.model), open_clip.get_tokenizer("glyph-tiny")

    return Trainer(cfg, problem)


def test_resumes_to_the_same_bits(dassl, problem, tmp_path):
    """Dassl's own checkpoint holds the state of the class sampler."""
    whole = make(dassl, problem, tmp_path / "whole", epochs=2, KEEP_RATIO=0.3)
    whole.train()
    first = make(dassl, problem, tmp_path / "half", epochs=2, save=True, KEEP_RATIO=0.3)
    first.max_epoch = 1
    first.train()
    second = make(dassl, problem, tmp_path / "half", epochs=2, KEEP_RATIO=0.3)
    second.train()
    assert second.start_epoch == 1
    assert trained(second.model).equal(trained(whole.model))
    assert not trained(second.model).equal(trained(first.model))


def test_weights_of_other_classes(dassl, problem, tmp_path):
    """Base-to-new: a model tuned on some classes is evaluated on others."""
    base = make(dassl, problem, tmp_path, save=True)
    base.train()
    new = make(dassl, problem._replace(tokens=problem.tokens[:5], labels=problem.labels % 5), tmp_path / "new")
    new.load_model(str(tmp_path), epoch=1)
    assert trained(new.model).equal(trained(base.model))
    assert new.model_inference(problem.images[:3]).shape == (3, 5)
    assert 0 <= new.test() <= 1
    before = trained(new.model)
    new.load_model("")  # zero-shot
    assert trained(new.model).equal(before)


def test_options(dassl, problem, tmp_path):
    trainer = make(dassl, problem, tmp_path, MAX_KEEP=3, TEXT_LR=0.25, IMAGE_LR=0.0, PREC="amp")
    assert [group["lr"] for group in trainer.optim.param_groups] == [0.25, trainer.cfg.OPTIM.LR]
    trainer.batch_idx, trainer.num_batches = 0, 2
    batch = {"img": problem.images[:2], "label": problem.labels[:2]}
    exact = trainer.model(*batch.values()).loss.item()
    loss = trainer.forward_backward(batch)["loss"]
    assert loss != exact  # bf16 has three digits
    assert loss == pytest.approx(exact, rel=0.05)
    cfg = SimpleNamespace(TRAINER=SimpleNamespace())
    dassl.extend_cfg(cfg)
    assert vars(cfg.TRAINER.SKIPKERNELS) == dassl.DEFAULTS
    del trainer.cfg.TRAINER.SKIPKERNELS  # the defaults hold
    assert dassl._option(trainer.cfg, "SKIP_LAYERS") == 6
    with pytest.raises(ValueError, match='PREC must be "fp32" or "amp"; got \'fp16\''):
        make(dassl, problem, tmp_path, PREC="fp16")


@pytest.mark.parametrize(
    ("dataset", "template", "prompt"),
    [
        ("DescribableTextures", "", "itap of a class 1."),
        ("FGVCAircraft", "", "a bright photo of a class 1, a type of aircraft."),
        ("Unknown", "", "a photo of a class 1."),
        ("EuroSAT", "{}!", "class 1!"),
    ],
)
def test_prompts(dassl, problem, dataset, template, prompt):
    cfg = runner.config(Path(), problem, TEMPLATE=template)
    cfg.DATASET.NAME = dataset
    assert dassl.SkipKernels.prompts(SimpleNamespace(cfg=cfg), NAMES)[1] == prompt


def test_loads_clip(dassl, problem, monkeypatch):
    """The project's own `clip` where it knows the name, open_clip otherwise."""
    cfg = runner.config(Path(), problem)
    model, tokenize = dassl.SkipKernels.load_clip(SimpleNamespace(cfg=cfg))
    assert isinstance(model, open_clip.CLIP)
    assert tokenize("a").shape == (1, problem.tokens.shape[1])
    clip: Any = ModuleType("clip")
    clip.available_models, clip.tokenize = lambda: ["ViT-B/16"], "tokenize"
    clip.load = lambda name, device: (f"{name} on {device}", "transform")
    monkeypatch.setitem(sys.modules, "clip", clip)
    cfg.MODEL.BACKBONE.NAME = "ViT-B/16"
    assert dassl.SkipKernels.load_clip(SimpleNamespace(cfg=cfg)) == ("ViT-B/16 on cpu", "tokenize")
    monkeypatch.setitem(sys.modules, "clip", None)
    found = {}
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: found.update({name: pretrained}))
    dassl.SkipKernels.load_clip(SimpleNamespace(cfg=cfg))
    assert found == {"ViT-B-16-quickgelu": "openai"}


def test_without_dassl():
    with pytest.raises(ImportError, match="needs Dassl .* It is on no package index: install https"):
        import skipkernels.integrations.dassl  # noqa: F401
