"""TuneConfig: defaults, refused settings, and YAML."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.methods import METHODS
from skipkernels.app.schema import schema
from tests.app.train.runs import SMALL, fails, small


def test_yaml_round_trip(tmp_path):
    config = small(tmp_path, skip_layers=2, text_lr=1e-3, template=("a {}.", "{}"), root=tmp_path, clip_grad_norm=1.0)
    (tmp_path / "config.yaml").write_text(config.resolved().to_yaml())
    read = TuneConfig.from_yaml(tmp_path / "config.yaml")
    assert read == config.resolved() and read.template == ("a {}.", "{}") and read.root == tmp_path


def test_yaml_round_trip_of_cache(tmp_path):
    config = small(tmp_path, cache=tmp_path / "cache", cache_dtype="int8", views=2, workers=1).resolved()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    read = TuneConfig.from_yaml(tmp_path / "config.yaml")
    assert read == config and read.cache == tmp_path / "cache"


def test_strings_are_paths_and_lists_tuples(tmp_path):
    given = small(str(tmp_path), cache=str(tmp_path / "cache"), resume=str(tmp_path), template=["a {}."], log=["csv"])
    assert given == small(tmp_path, cache=tmp_path / "cache", resume=tmp_path, template=("a {}.",), log=("csv",))


def test_resolved_is_idempotent():
    for method in METHODS:
        config = dataclasses.replace(SMALL, method=method, epochs=None).resolved()
        assert config.resolved() == config


def test_resolved_uses_published_recipe():
    config = TuneConfig(model="ViT-B-16", pretrained="random").resolved()
    assert (config.epochs, config.text_lr, config.image_lr, config.warmup_lr) == (20, 2e-5, 5e-6, 1e-6)
    assert (config.batch_size, config.sampler, config.tail, config.optimizer) == (4, "class_pure", "resample", "sgd")
    assert TuneConfig().resolved().text_lr == 4e-3 and TuneConfig().resolved().classes == 100


def test_resolved_glyph_tiny_on_other_data():
    own, glyphs = (TuneConfig(data=data).resolved() for data in ("imagefolder:emoji", "glyphs:greek"))
    assert (own.epochs, own.optimizer, own.text_lr, own.image_lr, own.sampler) == (8, "adamw", 1e-3, 1e-3, "random")
    assert (glyphs.optimizer, glyphs.text_lr, glyphs.image_lr, glyphs.sampler) == ("sgd", 4e-3, 2e-3, "class_pure")
    assert TuneConfig(data="imagefolder:emoji", optimizer="sgd").resolved().momentum == 0.9
    assert TuneConfig(data="imagefolder:emoji", preset="reference").resolved().text_lr == 1e-5


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("base-to-new", (20, 2e-5, 5e-6, 1, 1e-6)),
        ("cross-dataset", (20, 1e-5, 1e-6, 1, 1e-8)),
        ("domain-generalization", (20, 1e-5, 1e-6, 1, 1e-8)),
        ("few-shot", (40, 1e-5, 1e-5, 0, 0.0)),
    ],
)
def test_resolved_reference_preset(protocol, expected):
    config = TuneConfig(preset="reference", protocol=protocol).resolved()
    assert (config.epochs, config.text_lr, config.image_lr, config.warmup_epochs, config.warmup_lr) == expected
    assert (config.batch_size, config.sampler, config.tail) == (4, "class_pure", "fixed")
    assert (config.momentum, config.weight_decay, config.skip_layers) == (0.9, 5e-4, 0.5)


def test_resolved_reference_few_shots_sampler():
    assert TuneConfig(preset="reference", shots=3).resolved().sampler == "random"
    assert TuneConfig(preset="reference", shots=3, sampler="class_pure").resolved().sampler == "class_pure"


@pytest.mark.parametrize("method", METHODS)
def test_with_method_resets_unused_settings(method):
    every = dataclasses.replace(SMALL, skip_layers=2, decay=0.5, keep_embeddings=True, text_lr=1.0, image_lr=1.0)
    config = every.with_method(method)
    assert config.resolved().method == method and config.shots == every.shots
    assert (config.skip_layers == 2) == (config.decay == 0.5) == (method == "skip")
    assert config.keep_embeddings == (method in ("coop", "clip-adapter"))
    assert config.text_lr == (1.0 if method in ("skip", "full", "coop", "lora") else None)


@pytest.mark.parametrize("data", ["coop:imagenet", "coop:sun397", "torchvision:food101"])
def test_resolved_large_dataset_epochs(data):
    assert TuneConfig(data=data, model="ViT-B-16", pretrained="random").resolved().epochs == 5
    assert TuneConfig(data=data, model="ViT-B-16", pretrained="random", epochs=7).resolved().epochs == 7


def test_resolved_epochs_depend_on_classes():
    """126 of 252 classes are base: 2,000 steps are 125 epochs of 16; with all classes, 63 of 32."""
    config = TuneConfig(model="ViT-B-32", pretrained="random", method="lora", shots=4, classes=1000)
    assert config.resolved().epochs == 125
    assert dataclasses.replace(config, protocol="few-shot").resolved().epochs == 63


def test_differs_from():
    run = SMALL.resolved()
    assert run.differs_from(dataclasses.replace(SMALL, memory="min", resume=True).resolved()) == []
    assert run.differs_from(dataclasses.replace(SMALL, seed=1, shots=2).resolved()) == ["shots", "seed"]
    cached = dataclasses.replace(SMALL, cache="c").resolved()
    assert cached.differs_from(dataclasses.replace(SMALL, cache="d").resolved()) == []
    assert cached.differs_from(run) == ["cache_dtype"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "skipp"}, "method must be one of skip, zero-shot, full, .*lora; got 'skipp'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"method": "zero-shot", "epochs": 3}, 'epochs=3 has no effect with method="zero-shot"'),
        ({"method": "zero-shot", "epochs": None, "text_lr": 1.0}, "text_lr=1.0 has no effect"),
        ({"method": "linear-probe", "epochs": None, "clip_grad_norm": 1.0}, "clip_grad_norm=1.0 has no effect"),
        ({"method": "full", "skip_layers": 2}, 'skip_layers=2 has no effect with method="full"; leave it out'),
        ({"method": "lora", "tail": "fixed"}, 'tail=fixed has no effect with method="lora"'),
        ({"method": "coop", "image_lr": 1e-3}, 'image_lr=0.001 has no effect with method="coop"'),
        ({"keep_embeddings": True}, 'keep_embeddings=True has no effect with method="skip"'),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"views": 2}, "add `cache=…`"),
        ({"refresh": "epoch"}, "add `cache=…`"),
        ({"views": 0}, "views must be at least 1; got 0"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
        ({"text_lr": float("nan")}, "text_lr must be at least 0; got nan"),
        ({"momentum": 1.0}, "momentum must be below 1; got 1.0"),
        ({"clip_grad_norm": math.inf}, "clip_grad_norm must be below inf; got inf"),
        ({"image_lr": math.inf}, "image_lr must be below inf"),
        ({"seed": -5}, "seed must be at least 0; got -5"),
        ({"seed": 2**31}, "seed must be below 2147483648; got 2147483648"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be above 0"),
        ({"optimizer": "adamv"}, "no optimizer 'adamv'; did you mean"),
        ({"optimizer": "zzz"}, "choose sgd, torch-sgd, or a class of torch.optim"),
        ({"optimizer": "LBFGS"}, "evaluates the loss several times"),
        ({"optimizer": "AdamW", "precision": "bf16-sr"}, "Use bf16 with it"),
        ({"optimizer": "AdamW", "fused_optimizer": True}, 'optimizer="AdamW" does not; use sgd'),
        ({"clip_grad_norm": 1.0, "fused_optimizer": True}, "needs all gradients"),
        ({"precision": "fp16", "fused_optimizer": True}, "needs gradients to scale"),
        ({"resume": True, "overwrite": True}, "pass only one"),
        ({"device": "cuda:99"}, "can't be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_resolved_refuses_settings(changes, message):
    with pytest.raises(InputError, match=message) as error:
        dataclasses.replace(SMALL, **changes).resolved()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "not readable as YAML"), ("just text", "expected a mapping"), ("colour: red", "unknown setting"),
     ("shots: many", "shots must be"), ("template: {}", "template must be"), ("template: [1]", "template must be"),
     ("epochs: true", "epochs must be")],
)  # fmt: skip
def test_from_yaml_refuses_damaged_file(tmp_path, text, message, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert message in fails(["eval", tmp_path], capsys)


@pytest.mark.parametrize(
    ("data", "protocol"),
    [("imagefolder:photos", "few-shot"), ("glyphs", "base-to-new"), ("glyphs:greek", "base-to-new"),
     ("coop:dtd", "base-to-new"), ("torchvision:food101", "base-to-new")],
)  # fmt: skip
def test_resolved_protocol_by_data(data, protocol):
    config = dataclasses.replace(SMALL, data=data)
    assert config.protocol is None and config.resolved().protocol == protocol
    for asked in ("base-to-new", "few-shot"):
        assert dataclasses.replace(config, protocol=asked).resolved().protocol == asked


def test_resolved_recipe_by_default_protocol():
    """Wu et al. train 40 epochs for few-shot, 20 for base-to-new."""
    config = TuneConfig(preset="reference", data="imagefolder:photos").resolved()
    assert (config.epochs, config.image_lr) == (40, 1e-5)


def test_config_file_gives_defaults_that_flags_replace(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("shots: 3\nclasses: 9\ntemplate: ['a {}.']\nlog: [csv]\nout: some/where\n")
    assert main(["tune", "--config", str(file), "--shots", "5", "--log", "none", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    again = TuneConfig.from_yaml(tmp_path / "printed.yaml")
    assert (again.shots, again.classes, again.template, again.log) == (5, 9, ("a {}.",), ("none",))
    assert again.epochs == 8 and again.device == "auto" and again.out == Path("some/where"), "the method's defaults"
    assert printed.startswith("# yaml-language-server: $schema=https://")


def test_config_file_of_a_run_is_another_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(small(tmp_path, resume=True).to_yaml())
    assert main(["tune", f"--config={tmp_path / 'config.yaml'}", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["classes"] == 12 and printed["out"] is None and printed["resume"] is False


@pytest.mark.parametrize(
    ("text", "message"), [(None, "mine.yaml: no such file."), ("epoch: 3", "'epoch'; did you mean epochs?")]
)
def test_config_file_that_can_not_be_used(tmp_path, text, message, capsys):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    assert message in fails(["tune", "--config", tmp_path / "mine.yaml"], capsys)


def test_schema_of_the_documentation_is_that_of_the_settings():
    """Write it again with python -m skipkernels.app.schema > docs/config.schema.json."""
    found = json.loads((Path(__file__).parents[3] / "docs" / "config.schema.json").read_text())
    assert found == json.loads(json.dumps(schema()))
    properties = found["properties"]
    assert {*properties, "trust"} == {field.name for field in dataclasses.fields(TuneConfig)}
    assert all(setting["description"] for setting in properties.values())
    assert properties["momentum"]["anyOf"][0] == {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
