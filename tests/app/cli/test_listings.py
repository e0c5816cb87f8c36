"""`skipkernels models` and `skipkernels datasets`: what can be named."""

from __future__ import annotations

import json

import open_clip

from skipkernels.app.cli.main import main
from skipkernels.app.data import coop
from skipkernels.app.data.registry import KINDS


def listed(capsys, *arguments: str):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_models(capsys):
    found = listed(capsys, "models")
    others = {"pictogram-tiny", *open_clip.list_models()} ^ set(found)  # of open_clip 4: audio and captions
    assert all(name.startswith(("CLAP", "naflexclap", "naflexgenl")) for name in others)
    assert "openai" in found["ViT-B-16-quickgelu"]["weights"] and "openai" not in found["ViT-B-16"]["weights"]
    assert found["ViT-B-16-SigLIP"]["image"] == "timm vit_base_patch16_siglip_224"
    assert found["RN50"]["image"] == "ResNet" and found["roberta-ViT-B-32"]["text"] == "roberta-base"
    assert set(listed(capsys, "models", "b-16-QUICK")) == {"ViT-B-16-quickgelu"}
    assert main(["models", "pictogram"]) == 0
    out, err = capsys.readouterr()
    assert "pictogram-tiny" in out and "packaged" in out and "local-dir:DIR" in err
    assert main(["models", "nothing[/]"]) == 1
    assert "no model or weights with 'nothing[/]'" in capsys.readouterr().err


def test_datasets(capsys):
    assert KINDS["coop"].about.rpartition(": ")[2] == ", ".join(coop.DATASETS) + "."
    assert main(["datasets"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "    skipkernels tune --data csv:photos/table.csv" in out
    assert "coop:NAME such as coop:dtd (with --root)" in out
