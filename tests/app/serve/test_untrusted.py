"""Folders of unknown authors: no code runs, and no source is loaded that only a file names."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.train import evaluate_run
from skipkernels.app.train.model import load_model


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


class Hostile:
    """Copy of a run with a tokenizer that names a Python file, which writes `marker` when it is imported."""

    def __init__(self, run: Path, parent: Path):
        self.folder, self.marker = parent / "hostile", parent / "executed"
        shutil.copytree(run, self.folder)

        def text_config(values):
            values["model_cfg"]["text_cfg"] |= {
                "hf_tokenizer_name": "tokenizer", "tokenizer_kwargs": {"trust_remote_code": True}
            }  # fmt: skip

        change_json(self.folder / "open_clip_config.json", text_config)
        auto_map = {"auto_map": {"AutoTokenizer": ["hostile.Hostile", None], "AutoConfig": "hostile.Hostile"}}
        (self.folder / "config.json").write_text(json.dumps({"model_type": "hostile"} | auto_map))
        tokenizer = {"tokenizer_class": "Hostile", "name_or_path": "/home/me/tokenizer", "pad_token": "<pad>"}
        (self.folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | auto_map))
        (self.folder / "hostile.py").write_text(f"open({str(self.marker)!r}, 'w')\nclass Hostile: pass\n")
        plain = Tokenizer(models.WordLevel({"<pad>": 0, "greek": 1, "letter": 2}, unk_token="<pad>"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        plain.save(str(self.folder / "tokenizer.json"))
        self.set(model=f"local-dir:{self.folder}", cache=None)

    def set(self, **settings) -> None:
        """Change settings in config.yaml, and the model in classifier.json."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
        names = {name: settings[name] for name in ("model", "pretrained") if name in settings}
        change_json(self.folder / "classifier.json", lambda values: values.update(names))


@pytest.fixture
def hostile(run, tmp_path, monkeypatch) -> Hostile:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where trust_remote_code is not given
    return Hostile(run.folder, tmp_path)


ENTRY_POINTS = {
    "load": lambda run, out: sk.Classifier.load(run, device="cpu"),
    "predict": lambda run, out: main(["predict", str(run), str(out.parent / "photo.png"), "--device", "cpu"]),
    "eval": lambda run, out: main(["eval", str(run)]),
    "export": lambda run, out: main(["export", str(run), "--to", "open-clip", "--out", str(out)]),
    "blend": lambda run, out: main(["blend", str(run), "--out", str(out)]),
    "resume": lambda run, out: main(["tune", "--resume", str(run), "--epochs", "2"]),
    "config": lambda run, out: main(["tune", "--config", str(run / "config.yaml"), "--out", str(out)]),
    "model": lambda run, out: main(
        f"tune --model local-dir:{run} --max-classes 4 --shots 1 --epochs 1 --out {out}".split()
    ),
    "report": lambda run, out: main(["report", str(run)]),
    "load_model": lambda run, out: load_model(f"local-dir:{run}", None, torch.device("cpu")),
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_no_code_runs(entry, hostile, run, tmp_path):
    run.task.tests[0].images[0][0].save(tmp_path / "photo.png")
    with contextlib.suppress(InputError):
        ENTRY_POINTS[entry](hostile.folder, tmp_path / "out")
    assert not hostile.marker.exists()
    assert not list((tmp_path / "out").rglob("*.py"))


SOURCES = [{"model": "hf-hub:org/name"}, {"model": "ViT-B-32", "pretrained": "/home/me.pt"}]


@pytest.fixture(params=SOURCES, ids=str)
def source(request, hostile) -> tuple[str, str]:
    """Setting by which the files of `hostile` name a model, of which there is none in the folder, and its value."""
    (hostile.folder / "open_clip_config.json").unlink()
    hostile.set(**{"pretrained": None} | request.param)
    return list(request.param.items())[-1]


def test_load_refuses_source_in_file(hostile, source):
    name, value = source
    with pytest.raises(InputError, match=f"{name} must not be remote .* got '{value}'.*add `trust=True`"):
        sk.Classifier.load(hostile.folder)


@pytest.mark.parametrize("entry", ["predict", "eval", "export", "blend", "resume", "config"])
def test_command_refuses_source_in_file(entry, hostile, source, run, tmp_path, capsys):
    name, value = source
    run.task.tests[0].images[0][0].save(tmp_path / "photo.png")
    assert ENTRY_POINTS[entry](hostile.folder, tmp_path / "out") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{name} must not be remote" in error and value in error and error.endswith("add --trust.")


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [("model", "local-dir:a", True), ("model", "hf-hub:a/b", True), ("model", "ViT-B-32", False),
     ("pretrained", "laion2b_s34b_b79k", False), ("pretrained", "weights.pt", False), ("pretrained", "/w.pt", True),
     ("pretrained", "a/../../w.pt", True), ("pretrained", "~/w.pt", True), ("pretrained", "https://a/w.pt", True),
     ("pretrained", r"\\\\host\w.pt", True), ("pretrained", r"C:\w.pt", True), ("data", "hf:food101", True),
     ("data", "imagefolder:/home/me/photos", False)],
)  # fmt: skip
def test_from_yaml_refuses_sources(tmp_path, name, value, refused):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: value}))
    for options in ({"trust": True}, {"given": [name]}, {}):
        if refused and not options:
            with pytest.raises(InputError, match=f"{name} must not be remote"):
                TuneConfig.from_yaml(tmp_path / "config.yaml")
        else:
            assert TuneConfig.from_yaml(tmp_path / "config.yaml", **options) == TuneConfig(**{name: value})


def test_config_file_accepts_named_source_and_no_trust(hostile, tmp_path, capsys):
    arguments = ["tune", "--config", str(hostile.folder / "config.yaml"), "--print-config"]
    assert main(arguments) == 2
    assert main([*arguments, "--model=pictogram-tiny"]) == 0 and main([*arguments, "--trust"]) == 0
    assert "trust" not in capsys.readouterr().out
    hostile.set(trust=True)
    assert main([*arguments, "--trust"]) == 2
    assert "trust is not taken from a file" in capsys.readouterr().err


def test_eval_does_not_need_trust_for_model_in_folder(run, hostile):
    hostile.set(model="hf-hub:org/name")
    shutil.copy(run.folder / "open_clip_config.json", hostile.folder)
    assert evaluate_run(hostile.folder) == run.metrics["tuned"]
