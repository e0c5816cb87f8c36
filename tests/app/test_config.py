"""TuneConfig: defaults, refused settings, and files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.methods import METHODS, TrainingData
from skipkernels.options import Protocol
from tests.app.runs import SMALL, fails, small


@pytest.mark.parametrize("changes", [
    {"skip_layers": 2, "text_lr": 1e-3, "template": ("a {}.", "{}"), "root": Path("r")},
    {"cache": Path("cache"), "cache_dtype": "int8", "refresh": "epoch", "workers": 1},
])  # fmt: skip
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_file_round_trip(tmp_path, changes, form):
    config = small(tmp_path, **changes).resolved()
    text = config.to_yaml()
    (tmp_path / f"config.{form}").write_text(text if form == "yaml" else json.dumps(yaml.safe_load(text)))
    assert TuneConfig.from_yaml(tmp_path / f"config.{form}") == config


def test_strings_are_paths_and_lists_tuples(tmp_path):
    given = small(str(tmp_path), cache=str(tmp_path / "cache"), template=["a {}."])
    assert given == small(tmp_path, cache=tmp_path / "cache", template=("a {}.",))
    at_home = TuneConfig(out="~/run", cache="~/features", resume="~/run")
    assert at_home == TuneConfig(out=Path.home() / "run", cache=Path.home() / "features", resume=Path.home() / "run")


@pytest.mark.parametrize("protocol", get_args(Protocol))
def test_resolved_uses_published_recipe(protocol):
    """By default for another model, and by the preset; `test_published_recipes` has the values."""
    recipe = dataclasses.asdict(METHODS["skip"].recipe("ViT-B-16", TrainingData(protocol=protocol)))
    del recipe["tail"]
    default = TuneConfig(method="skip", model="ViT-B-16", pretrained="random", protocol=protocol)
    for config, tail in ((default, "resample"), (TuneConfig(preset="reference", protocol=protocol), "fixed")):
        assert {name: getattr(config.resolved(), name) for name in recipe} == recipe
        assert config.resolved().tail == tail
    assert TuneConfig().resolved().text_lr == 4e-3, "of `published_optimizer`"


def test_resolved_reference_few_shots_sampler():
    assert TuneConfig(preset="reference", shots=3).resolved().sampler == "random"
    assert TuneConfig(preset="reference", shots=3, sampler="class_pure").resolved().sampler == "class_pure"


@pytest.mark.parametrize("method", METHODS)
def test_with_method_resets_unused_settings(method):
    every = dataclasses.replace(SMALL, skip_layers=2, decay=0.5, text_lr=1.0, image_lr=1.0)
    config = every.with_method(method)
    assert config.resolved().resolved() == config.resolved()
    assert config.resolved().method == method and config.shots == every.shots
    assert (config.skip_layers == 2) == (config.decay == 0.5) == (method == "skip")
    assert config.text_lr == (1.0 if method in ("skip", "full", "coop", "lora") else None)


@pytest.mark.parametrize(
    ("data", "epochs"),
    [("coop:imagenet", 5), ("coop:sun397", 5), ("coop:food101", 5), ("coop:dtd", 20), ("imagefolder:food101", 20),
     ("hf:food101", 20)],
)  # fmt: skip
def test_resolved_large_dataset_epochs(data, epochs):
    """A quarter for three published datasets, but not for a folder or another dataset with such a name."""
    named = {"method": "skip", "protocol": "base-to-new", "model": "ViT-B-16", "pretrained": "random"}
    assert TuneConfig(data=data, **named).resolved().epochs == epochs
    assert TuneConfig(data=data, **named, epochs=7).resolved().epochs == 7


def test_resolved_epochs_depend_on_classes():
    """78 of 156 classes are base: 2,000 steps are 200 epochs of 10; with all classes, 100 of 20."""
    named = {"data": "pictograms:animals", "model": "ViT-B-32", "pretrained": "random"}
    config = TuneConfig(**named, method="lora", shots=4, max_classes=1000)
    assert config.resolved().epochs == 200
    assert dataclasses.replace(config, protocol="few-shot").resolved().epochs == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"method": "zero-shot", "epochs": 3}, "epochs: 3 has no effect with `method=zero-shot`"),
        ({"method": "zero-shot", "epochs": None, "text_lr": 1.0}, "text_lr: 1.0 has no effect"),
        ({"method": "full", "skip_layers": 2}, "skip_layers: 2 has no effect with `method=full`; leave it out"),
        ({"method": "coop", "image_lr": 1e-3}, "image_lr: 0.001 has no effect with `method=coop`"),
        ({"method": "linear-probe", "epochs": None, "refresh": "epoch"}, "refresh: epoch has no effect without epochs"),
        (
            {"method": "linear-probe", "epochs": None, "head": "probe"},
            "head: probe has no effect with `method",
        ),
        ({"class_weight": "balanced", "sampler": "class_pure"},
         "class_weight must be left out for batches of one class; or use `sampler=random`"),
        ({"class_weight": "balanced", "sampler": "balanced"},
         "class_weight must be left out with `sampler=balanced`, or it would balance twice"),
        ({"class_weight": "balanced", "method": "full"}, "class_weight: balanced has no effect with `method=full`"),
        ({"class_weight": 1.5}, "class_weight must be balanced, or above 0 and at most 1; got 1.5"),
        ({"class_weight": 0}, "class_weight must be balanced, or above 0 and at most 1; got 0"),
        ({"validation": 1.5}, "validation must be a share between 0 and 1, or a text; got 1.5"),
        ({"method": "auto", "refresh": "epoch"}, "refresh: epoch needs a chosen method and head; add `method=skip`"),
        ({"prior": "balanced"}, "prior: balanced is that of a head; add `head=anchored`"),
        ({"method": "lora", "blend": 0.5}, "blend: 0.5 has no effect with `method"),
        ({"epochs": 0, "head": "anchored", "blend": 0.5}, "blend: 0.5 has no effect without epochs"),
        ({"resume": Path("run"), "overwrite": True}, "resume: continues the run in its folder; leave out `out`"),
        ({"device": "cuda:99"}, "can't be used"),
        ({"device": "meta"}, "device 'meta' can't be used: Cannot copy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_resolved_refuses_settings(changes, message):
    with pytest.raises(InputError, match=message) as error:
        dataclasses.replace(SMALL, **changes).resolved()
    assert "\n" not in str(error.value)


WRONG = {
    "seed: -5": "seed must be greater than or equal to 0; got -5.",
    "text_lr: .nan": "text_lr must be a finite number; got nan.",
    "shots: many": "shots must be a valid integer or 'all'; got 'many'.",
    "template: 'a {}.'": "template must be a valid tuple; got 'a {}.'.",
    "root: 1": "root must be a valid path for <class 'pathlib.Path'>; got 1.",
    "method: skipp": f"method must be one of auto, {', '.join(METHODS)}; got 'skipp'.",
    "optimizer: adamv": "optimizer must be 'sgd' or 'adamw'; got 'adamv'.",
    "epoch: 3": "unknown setting 'epoch'; did you mean epochs?",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG)
def test_wrong_setting_is_one_line(tmp_path, text, message, capsys):
    """In the folder of a run and in a file of --config."""
    (tmp_path / "config.yaml").write_text(text)
    for arguments in (["eval", tmp_path], ["tune", "--config", tmp_path / "config.yaml"]):
        assert fails(arguments, capsys) == f"error {tmp_path / 'config.yaml'}: {message}"


DAMAGED = {
    None: "can't be read (No such file or directory)",
    "model: [": "not readable as YAML",
    "just text": "expected a mapping",
    "trust: true": "trust is not taken from a file",
}


@pytest.mark.parametrize("text", DAMAGED, ids=DAMAGED.values())
def test_from_yaml_refuses_damaged_file(tmp_path, text):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=f"mine.yaml: .*{re.escape(DAMAGED[text])}"):
        TuneConfig.from_yaml(file)


@pytest.mark.parametrize(
    ("data", "protocol"),
    [("imagefolder:photos", "few-shot"), ("pictograms", "base-to-new"), ("pictograms:food", "base-to-new"),
     ("coop:dtd", "base-to-new")],
)  # fmt: skip
def test_resolved_protocol_by_data(data, protocol):
    config = dataclasses.replace(SMALL, data=data)
    assert config.protocol is None and config.resolved().protocol == protocol
    for asked in ("base-to-new", "few-shot"):
        assert dataclasses.replace(config, protocol=asked).resolved().protocol == asked


def test_config_file_gives_defaults_that_options_replace(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("shots: 3\nmax_classes: 9\ntemplate: ['a {}.']\nmemory: min\ncache: features\n")
    assert main(["tune", f"--config={file}", "--shots", "5", "--memory", "fast", "--print-config"]) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    file.write_text(printed)
    again = TuneConfig.from_yaml(file)
    assert (again.shots, again.max_classes, again.template, again.memory) == (5, 9, ("a {}.",), "fast")
    assert again.epochs == 8 and again.device == "auto" and again.cache == Path("features"), "the method's defaults"


def test_config_file_says_what_is_not_taken_from_it(tmp_path, capsys):
    """A file describes a run; where another run goes, and what it replaces, is said by its command."""
    file = tmp_path / "config.yaml"
    file.write_text(small(tmp_path, overwrite=True).to_yaml())
    assert main(["tune", "--config", str(file), "--print-config"]) == 0
    printed, said = capsys.readouterr()
    assert said == f"note: not taken from {file}: --out, --overwrite\n"
    values = yaml.safe_load(printed)
    assert values["max_classes"] == 24 and values["out"] is None and values["overwrite"] is False
