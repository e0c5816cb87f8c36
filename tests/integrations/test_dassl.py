"""`integrations.dassl` in the stand-in for Dassl of dassl_stand_in.py, and in Dassl where it can be fetched."""

from __future__ import annotations

import copy
import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from bench.trainers.common import WEIGHT_TOLERANCE, NaiveCLIP, Problem, small_problem, trained
from skipkernels.app.demo import pictogram_tiny
from skipkernels.testing import relative_error
from tests.integrations import dassl_stand_in as runner

pictogram_tiny.register()  # so that open_clip knows its tokenizer

NAMES = [f"class_{n}" for n in range(12)]  # of the stand-in
DASSL = "https://github.com/KaiyangZhou/Dassl.pytorch", "c61a1b570ac6333bd50fb5ae06aea59002fb20bb"


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem(steps=6)


@pytest.fixture
def dassl() -> Iterator[Any]:
    """The module under test."""
    with runner.engine():
        import skipkernels.integrations.dassl as module

        yield module


def registered(problem: Problem) -> type:
    """The registered trainer on pictogram-tiny, which records the labels and the rates of each step."""
    engine = sys.modules["dassl.engine"]
    registry = engine.TRAINER_REGISTRY

    class Trainer(registry["SkipKernels"] if isinstance(registry, dict) else registry.get("SkipKernels")):
        def load_clip(self) -> Any:
            self.labels, self.rates, self.batches = [], [], []
            return copy.deepcopy(problem.model), open_clip.get_tokenizer("pictogram-tiny")

        def forward_backward(self, batch: Any) -> Any:
            self.labels.append(batch["label"].tolist())
            self.batches.append((batch["img"], batch["label"]))
            self.rates.append([group["lr"] for group in self.optim.param_groups])
            return super().forward_backward(batch)

    return Trainer


def make(dassl: Any, problem: Problem, folder: Path, *, epochs: int = 1, save: bool = False, **options: Any) -> Any:
    """The trainer in the stand-in."""
    cfg = runner.config(folder, problem, **options)
    cfg.OPTIM.MAX_EPOCH, cfg.TRAIN.CHECKPOINT_FREQ = epochs, int(save)
    return registered(problem)(cfg, problem)


def states(trainer: Any) -> list[torch.Tensor]:
    """All that a checkpoint holds: weights, classes to be drawn, momentum and rates."""
    momentum = [state["momentum_buffer"] for state in trainer.optim.state.values()]
    rates = torch.tensor([group["lr"] for group in trainer.optim.param_groups], dtype=torch.float64)
    return [trained(trainer.model), trainer.model.get_extra_state(), *momentum, rates]


def test_weights_are_those_of_the_plain_module(dassl, problem, tmp_path):
    """On the same batches, with all classes kept."""
    trainer = make(dassl, problem, tmp_path)
    start = trained(trainer.model)
    trainer.train()
    tokens = open_clip.get_tokenizer("pictogram-tiny")(trainer.prompts(NAMES))
    plain = NaiveCLIP(copy.deepcopy(problem.model), tokens, problem.skip_layers, problem.keep_ratio)
    optimizer = problem.optimizer(plain)
    for images, labels in trainer.batches:
        plain(images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(trained(trainer.model) - start, trained(plain) - start) < WEIGHT_TOLERANCE


def test_resumes(dassl, problem, tmp_path):
    """Dassl's own checkpoint holds the state of the class sampler; the order of the images is not in it."""
    options = {"epochs": 3, "KEEP_RATIO": 0.3}
    first = make(dassl, problem, tmp_path, save=True, **options)
    first.max_epoch = 1
    first.train()
    second = make(dassl, problem, tmp_path, **options)
    assert second.resume_model_if_exist(str(tmp_path)) == 1
    assert [a.equal(b) for a, b in zip(states(first), states(second), strict=True)].count(False) == 0
    second.train()
    assert second.start_epoch == 1
    assert len(second.labels) == 2 * problem.steps
    assert not trained(second.model).equal(trained(first.model))


@pytest.mark.parametrize("sampler", ["class_pure", ""])
def test_batches_have_one_class(dassl, problem, tmp_path, sampler):
    """The published batches, in an order that is drawn again in each epoch."""
    trainer = make(dassl, problem, tmp_path, epochs=2, SAMPLER=sampler)
    trainer.train()
    assert sorted(sum(trainer.labels[: problem.steps], [])) == sorted(problem.labels.tolist())
    assert all(len(set(labels)) == 1 for labels in trainer.labels) == (sampler == "class_pure")
    assert trainer.labels[: problem.steps] != trainer.labels[problem.steps :]


def test_warm_up(dassl, problem, tmp_path):
    """The cosine begins after the warm-up. The warm-up of Dassl fails in current versions of PyTorch."""
    cfg = runner.config(tmp_path, problem, TEXT_LR=1e-2, IMAGE_LR=5e-3)
    vars(cfg.OPTIM).update(MAX_EPOCH=5, WARMUP_EPOCH=1, WARMUP_TYPE="constant", WARMUP_CONS_LR=1e-6)
    trainer = registered(problem)(cfg, problem)
    trainer.train()
    factors = [0.5 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(4)]
    expected = [[1e-6, 1e-6], *([1e-2 * factor, 5e-3 * factor] for factor in factors)]
    for found, rates in zip(trainer.rates[:: problem.steps], expected, strict=True):
        assert found == pytest.approx(rates)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "TRAINER.PREC",
            "fp16",
            "TRAINER.PREC is 'fp16' and TRAINER.SKIPKERNELS.PREC 'fp32': give both the same value",
        ),
        ("TRAINER.SKIP", runner.Node(START_LAYER=4), "SKIP.START_LAYER is 4 and TRAINER.SKIPKERNELS.SKIP_LAYERS 2"),
        ("TRAINER.SKIP", runner.Node(DROP_RATIO=0.1), "DROP_RATIO must be 0"),
        ("OPTIM.STAGED_LR", True, "STAGED_LR must be False: TRAINER.SKIPKERNELS.TEXT_LR and IMAGE_LR"),
        ("OPTIM.WARMUP_TYPE", "linear", r"got \('cosine', 'linear', True\)"),
        ("OPTIM.WARMUP_CONS_LR", 0.1, "WARMUP_CONS_LR must be at most the rate of each tower; got 0.1"),
        ("DATALOADER.TRAIN_X.SAMPLER", "RandomClassSampler", "For DATALOADER.TRAIN_X.SAMPLER RandomClassSampler set"),
        ("TRAINER.SKIPKERNELS.PREC", "fp16", 'PREC must be "fp32" or "amp"'),
        ("MODEL.BACKBONE.NAME", "hf-hub:a/b", "MODEL.BACKBONE.NAME must be a model that open_clip itself describes"),
    ],
)
def test_refuses_what_it_would_ignore(dassl, problem, tmp_path, name, value, message):
    cfg = runner.config(tmp_path, problem)
    cfg.merge_from_list(["OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_TYPE", "constant", "OPTIM.WARMUP_CONS_LR", 1e-6])
    dassl.SkipKernels.check_cfg(None, cfg)
    cfg.merge_from_list([name, value])
    with pytest.raises(ValueError, match=f"^SkipKernels: .*{message}"):
        dassl.SkipKernels.check_cfg(None, cfg)


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
    trainer = make(dassl, problem, tmp_path, MAX_KEEP=3, TEXT_LR=0.0, IMAGE_LR=-1.0, PREC="amp")
    assert [group["lr"] for group in trainer.optim.param_groups] == [0.0, trainer.cfg.OPTIM.LR]
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
    assert trainer.prompts(NAMES)[1] == "itap of a class 1."


@pytest.mark.parametrize(
    ("dataset", "protocol", "epochs", "image_lr"),
    [("ImageNet", "cross-dataset", 5, 1e-6), ("EuroSAT", "few-shot", 40, 1e-5)],
)
def test_set_published(dassl, problem, dataset, protocol, epochs, image_lr):
    cfg = runner.config(Path(), problem)
    cfg.DATASET.NAME, cfg.TRAINER.PREC, cfg.OPTIM.STAGED_LR = dataset, "fp16", True
    dassl.set_published(cfg, protocol)
    dassl.SkipKernels.check_cfg(None, cfg)
    assert (cfg.OPTIM.MAX_EPOCH, cfg.TRAINER.SKIPKERNELS.IMAGE_LR) == (epochs, image_lr)
    assert (cfg.TRAINER.SKIPKERNELS.SKIP_LAYERS, cfg.TRAINER.SKIPKERNELS.TAIL) == (6, "fixed")


@pytest.mark.parametrize(
    ("dataset", "template", "prompt"),
    [
        ("DescribableTextures", "", "itap of a class 1."),
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
    monkeypatch.setitem(sys.modules, "clip", clip)
    cfg.MODEL.INIT_WEIGHTS = "weights.pt"  # which the package would ignore
    dassl.SkipKernels.load_clip(SimpleNamespace(cfg=cfg))
    assert found == {"ViT-B-16-quickgelu": "weights.pt"}


# ---- Dassl itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def real_dassl(tmp_path, monkeypatch) -> Iterator[Any]:
    """The module under test, with an installed Dassl, or a pinned commit of it, fetched."""
    for name in ("yacs", "tabulate", "tensorboard"):
        pytest.importorskip(name, reason=f"Dassl needs {name}: pip install yacs tabulate tensorboard")
    if importlib.util.find_spec("dassl") is None:
        url, commit = DASSL
        try:
            for command in (
                ["init", "-q", "."],
                ["fetch", "-q", "--depth", "1", url, commit],
                ["checkout", "-q", commit],
            ):
                subprocess.run(["git", *command], cwd=tmp_path, check=True, timeout=60, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError):
            pytest.skip(f"{url} cannot be fetched")
        monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("wilds", "gdown"):  # for datasets to download
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["wilds"].get_dataset = None  # type: ignore[attr-defined]
    import skipkernels.integrations.dassl as module

    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "dassl" or name == module.__name__]:
        del sys.modules[name]


def test_published_settings_in_dassl(real_dassl, problem, tmp_path):
    from dassl.config import get_cfg_default
    from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum

    def datum(label: int, number: int) -> Any:
        path = tmp_path / f"{label}-{number}.png"
        to_pil_image(torch.rand(3, 32, 32)).save(path)
        return Datum(str(path), label, classname=f"class_{label}")

    images = [datum(label, number) for label in range(3) for number in range(8)]

    @DATASET_REGISTRY.register()
    class SUN397(DatasetBase):
        def __init__(self, cfg: Any):
            super().__init__(train_x=images, test=images)

    cfg = get_cfg_default()
    real_dassl.extend_cfg(cfg)
    cfg.DATASET.NAME = "SUN397"
    real_dassl.set_published(cfg)
    small = {"MODEL.BACKBONE.NAME": "pictogram-tiny", "INPUT.SIZE": (32, 32), "TRAINER.SKIPKERNELS.SKIP_LAYERS": 2}
    here = {"OUTPUT_DIR": str(tmp_path), "USE_CUDA": False, "DATALOADER.NUM_WORKERS": 0, "SEED": 1}
    cfg.merge_from_list([part for setting in (small | here).items() for part in setting])
    cfg.freeze()
    trainer = registered(problem)(cfg)
    trainer.train()

    assert all(len(set(labels)) == 1 for labels in trainer.labels) and len(trainer.labels) == 5 * 6
    factors = [0.5 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(4)]
    for found, rates in zip(trainer.rates[::6], [[1e-6] * 2, *([2e-5 * f, 5e-6 * f] for f in factors)], strict=True):
        assert found == pytest.approx(rates)
    assert 0 <= trainer.test() <= 100
    again = registered(problem)(cfg)
    assert again.resume_model_if_exist(str(tmp_path)) == 5
    assert [a.equal(b) for a, b in zip(states(trainer), states(again), strict=True)].count(False) == 0
