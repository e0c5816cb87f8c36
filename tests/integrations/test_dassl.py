"""`integrations.dassl` in the stand-in for Dassl of dassl_stand_in.py."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch

from skipkernels.app.demo import pictogram_tiny
from tests.integrations import dassl_stand_in as stand_in
from tests.integrations.problems import Problem, small_problem, trained

pictogram_tiny.register()  # so that open_clip knows its tokenizer

NAMES = [f"class_{n}" for n in range(12)]  # of the stand-in


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem(steps=6)


@pytest.fixture(scope="module")
def dassl() -> Iterator[Any]:
    """The module under test, in the stand-in."""
    name = "skipkernels.integrations.dassl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)  # so that what is imported below is removed again
        for module, names in stand_in.MODULES.items():
            patch.setitem(sys.modules, module, ModuleType(module))
            vars(sys.modules[module]).update(names)
        del sys.modules[name]
        yield importlib.import_module(name)


def make(problem: Problem, cfg: Any = None, **options: Any) -> Any:
    """The registered trainer on pictogram-tiny, which records the batches and the rates of each step."""

    class Trainer(stand_in.REGISTERED["SkipKernels"]):
        def load_clip(self) -> Any:
            self.rates, self.batches = [], []
            return copy.deepcopy(problem.model), open_clip.get_tokenizer("pictogram-tiny")

        def forward_backward(self, batch: Any) -> Any:
            self.batches.append((batch["img"], batch["label"]))
            self.rates.append([group["lr"] for group in self.optim.param_groups])
            return super().forward_backward(batch)

    return Trainer(cfg or stand_in.config(problem, **options), problem)


def test_weights_of_a_loop(dassl, problem):
    """On the same batches."""
    trainer = make(problem)
    plain = trainer.make_clip().train()
    start = trained(plain)
    trainer.train()
    problem.loop(plain, trainer.batches)
    assert trained(trainer.model).equal(trained(plain)) and not trained(plain).equal(start)


@pytest.mark.parametrize("sampler", ["class_pure", ""])
def test_batches_have_one_class(dassl, problem, sampler):
    """The published batches, in an order that is drawn again in each epoch."""
    trainer = make(problem, SAMPLER=sampler)
    first, second = ([batch["label"].tolist() for batch in trainer.train_loader_x] for _ in range(2))
    assert sorted(sum(first, [])) == sorted(problem.labels.tolist()) and first != second
    assert all(len(set(labels)) == 1 for labels in first + second) == (sampler == "class_pure")


def test_warm_up(dassl, problem):
    """The cosine begins after the warm-up. The warm-up of Dassl fails in current versions of PyTorch."""
    short = problem._replace(images=problem.images[:4], labels=problem.labels[:4])
    cfg = stand_in.config(short, TEXT_LR=1e-2, IMAGE_LR=5e-3)
    vars(cfg.OPTIM).update(MAX_EPOCH=5, WARMUP_EPOCH=1, WARMUP_TYPE="constant", WARMUP_CONS_LR=1e-6)
    trainer = make(short, cfg)
    trainer.train()
    factors = [0.5 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(4)]
    expected = [[1e-6, 1e-6], *([1e-2 * factor, 5e-3 * factor] for factor in factors)]
    for found, rates in zip(trainer.rates[:: short.steps], expected, strict=True):
        assert found == pytest.approx(rates)


# A setting, and words of the error
REFUSED: list[tuple[str, Any, str]] = [
    ("TRAINER.PREC", "fp16", "TRAINER.PREC is 'fp16' and TRAINER.SKIPKERNELS.PREC 'fp32': give both the same value"),
    ("TRAINER.SKIP", stand_in.Node(START_LAYER=4), "SKIP.START_LAYER is 4 and TRAINER.SKIPKERNELS.SKIP_LAYERS 2"),
    ("TRAINER.SKIP", stand_in.Node(DROP_RATIO=0.1), "DROP_RATIO must be 0"),
    ("OPTIM.STAGED_LR", True, "STAGED_LR must be False: TRAINER.SKIPKERNELS.TEXT_LR and IMAGE_LR"),
    ("OPTIM.WARMUP_TYPE", "linear", r"got \('cosine', 'linear', True\)"),
    ("OPTIM.WARMUP_CONS_LR", 0.1, "WARMUP_CONS_LR must be at most the rate of each tower; got 0.1"),
    ("DATALOADER.TRAIN_X.SAMPLER", "RandomClassSampler", "For DATALOADER.TRAIN_X.SAMPLER RandomClassSampler set"),
    ("TRAINER.SKIPKERNELS.PREC", "fp16", 'PREC must be "fp32" or "amp"'),
    ("MODEL.BACKBONE.NAME", "hf-hub:a/b", "MODEL.BACKBONE.NAME must be a model that open_clip itself describes"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_refuses_what_it_would_ignore(dassl, problem, name, value, words):
    cfg = stand_in.config(problem)
    cfg.merge_from_list(["OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_TYPE", "constant", "OPTIM.WARMUP_CONS_LR", 1e-6])
    dassl.SkipKernels.check_cfg(None, cfg)
    cfg.merge_from_list([name, value])
    with pytest.raises(ValueError, match=f"^SkipKernels: .*{words}"):
        dassl.SkipKernels.check_cfg(None, cfg)


def test_weights_of_other_classes(dassl, problem, tmp_path):
    """Base-to-new: a model tuned on some classes is evaluated on others."""
    base = make(problem)
    base.train()
    (tmp_path / "model").mkdir()
    torch.save({"state_dict": base.model.state_dict()}, tmp_path / "model/model.pth.tar-1")
    new = make(problem._replace(tokens=problem.tokens[:5], labels=problem.labels % 5))
    new.load_model(str(tmp_path), epoch=1)
    assert trained(new.model).equal(trained(base.model))
    assert new.model_inference(problem.images[:3]).equal(new.model.predict(problem.images[:3]))
    new.load_model("")  # changes nothing
    assert trained(new.model).equal(trained(base.model))


def test_options(dassl, problem):
    trainer = make(problem, MAX_KEEP=3, TEXT_LR=0.0, IMAGE_LR=-1.0, PREC="amp")
    assert [group["lr"] for group in trainer.optim.param_groups] == [0.0, trainer.cfg.OPTIM.LR]
    trainer.batch_idx, trainer.num_batches = 0, 2
    batch = {"img": problem.images[:2], "label": problem.labels[:2]}
    exact = trainer.model(*batch.values()).loss.item()
    loss = trainer.forward_backward(batch)["loss"]
    assert loss != exact  # bf16 has three digits
    assert loss == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    ("dataset", "protocol", "epochs", "image_lr"),
    [("ImageNet", "cross-dataset", 5, 1e-6), ("EuroSAT", "few-shot", 40, 1e-5)],
)
def test_set_published(dassl, problem, dataset, protocol, epochs, image_lr):
    cfg = stand_in.config(problem)
    file = {"PREC": "amp", "MAX_TAIL": 7, "TEMPLATE": "a {}.", "MEMORY": "min"}
    dassl.extend_cfg(cfg)
    vars(cfg.TRAINER.SKIPKERNELS).update(file)
    cfg.DATASET.NAME, cfg.TRAINER.PREC, cfg.OPTIM.STAGED_LR = dataset, "fp16", True
    dassl.set_published(cfg, protocol)
    dassl.SkipKernels.check_cfg(None, cfg)
    own = {"TEXT_LR": cfg.OPTIM.LR, "IMAGE_LR": image_lr, "TAIL": "fixed", "TEMPLATE": "a {}.", "MEMORY": "min"}
    assert vars(cfg.TRAINER.SKIPKERNELS) == dassl.DEFAULTS | own and epochs == cfg.OPTIM.MAX_EPOCH
    del cfg.TRAINER.SKIPKERNELS
    dassl.set_published(cfg, protocol)
    assert vars(cfg.TRAINER.SKIPKERNELS) == dassl.DEFAULTS | own | {"TEMPLATE": "", "MEMORY": "auto"}


def test_prompts(dassl, problem):
    trainer = SimpleNamespace(cfg=stand_in.config(problem))
    for dataset, prompt in (("DescribableTextures", "itap of a class 1."), ("Unknown", "a photo of a class 1.")):
        trainer.cfg.DATASET.NAME = dataset
        assert dassl.SkipKernels.prompts(trainer, NAMES)[1] == prompt
    trainer.cfg.TRAINER.SKIPKERNELS.TEMPLATE = "{}!"
    assert dassl.SkipKernels.prompts(trainer, NAMES)[1] == "class 1!"
    del trainer.cfg.TRAINER.SKIPKERNELS  # the defaults hold
    assert dassl.SkipKernels.prompts(trainer, NAMES)[1] == "a photo of a class 1."


# ---- load_clip -------------------------------------------------------------------------------------------------------


def loaded(dassl: Any, problem: Problem, name: str = "ViT-B/16", weights: str = "") -> Any:
    """Result of `load_clip` for a name and weights of the configuration."""
    cfg = stand_in.config(problem)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.INIT_WEIGHTS = name, weights
    return dassl.SkipKernels.load_clip(SimpleNamespace(cfg=cfg))


@pytest.fixture
def created(monkeypatch) -> dict[str, str]:
    """Weights of the models that open_clip creates, by name; none is created."""
    found: dict[str, str] = {}
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: found.update({name: pretrained}))
    return found


def test_open_clip_loads_the_model(dassl, problem):
    model, tokenize = loaded(dassl, problem, "pictogram-tiny")
    assert isinstance(model, open_clip.CLIP)
    assert tokenize("a").shape == (1, problem.tokens.shape[1])


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("ViT-B/16", "", {"ViT-B-16-quickgelu": "openai"}),
        ("ViT-L/14@336px", "", {"ViT-L-14-336-quickgelu": "openai"}),
        ("ViT-B/16", "weights.pt", {"ViT-B-16-quickgelu": "weights.pt"}),
    ],
)
def test_weights_are_those_of_openai_unless_others_are_named(dassl, problem, created, name, weights, expected):
    loaded(dassl, problem, name, weights)
    assert created == expected and open_clip.get_model_config(*expected)["quick_gelu"]
