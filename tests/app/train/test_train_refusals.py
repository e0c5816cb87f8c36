"""Refusals of `tune` and `eval`: of options, weights, folders and files; one line, exit code 2, nothing written."""

from __future__ import annotations

import os
import re

import open_clip
import pytest
import torch

from skipkernels.app.data import InputError
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.studies import runs
from skipkernels.app.train.model import check_activation, load_weights
from tests.app.data.pictures import make_folders
from tests.app.runs import fails

# ---- commands --------------------------------------------------------------------------------------------------------


SMALL = "tune --shots 2 --max-classes 12"
COMMANDS = {
    "tune --max-classes 1": "--max-classes must be a whole number, at least 2",
    "tune --batch-size 0": "error --batch-size must be greater than or equal to 1; got 0.",
    "tune --model ViT-B-61": "did you mean",
    "tune --model ViT-B-16": "ViT-B-16 needs weights",
    "tune --model ViT-B-16 --pretrained nonsense": "no tag 'nonsense'",
    "tune --model ViT-B-16 --pretrained openai":
        "--model: openai was trained with QuickGELU, and ViT-B-16 has GELU; use ViT-B-16-quickgelu.",
    "tune --model ViT-B-32-quickgelu --pretrained laion2b_s34b_b79k":
        "--model: laion2b_s34b_b79k was trained with GELU, and ViT-B-32-quickgelu has QuickGELU; use ViT-B-32.",
    "tune --pretrained nowhere/model.safetensors": "no file nowhere/model.safetensors",
    "tune --pretrained ~/no-such-file.pt": f"no file {os.path.expanduser('~/no-such-file.pt')}",
    f"{SMALL} --skip-layers 7": "error SkipCLIP: skip_layers must be a whole number from 0 to 4",
    f"{SMALL} --method full --cache c": "--cache: c has no effect with --method full; leave it out.",
    f"{SMALL} --skip-layers 0 --cache c": "--cache must be left out with --skip-layers 0: features are kept at the cut",
    "tune --data coop:imagenet --root a\n\x1b[2Jb\u202e": "error --root",
    "tune --template": "--template must have an item, such as 'a photo of a {}.'; got none.",
    f"{SMALL} --out file": "file is a file",
    f"{SMALL} --out file/run": "is not a writable folder",
    f"{SMALL} --out /proc/x": "/proc is not a writable folder",
    "check pictograms:food --out a.txt": "--out must end in .csv; got",
    "compare --methods skip skip": "--methods must be distinct names of skip, zero-shot, full",
    "compare --methods": "lora, auto; got none.",
    "compare --seeds 0": "--seeds must be a number of runs from 1 to 1000",
    "compare --methods skip zero-shot --skip-layers 9": "or a tuple (image, text) of either; got 9. (run: skip)",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=COMMANDS.values())
def test_command_is_refused(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_in_subprocess", runs._run)  # a new one imports PyTorch
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = fails(command.split(" "), capsys)
    assert COMMANDS[command] in said and said.isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is written"


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_tune_keeps_earlier_run(run, capsys):
    """Other errors of settings and data come first."""
    folder, _ = run
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    wrong = {"--epochs": -1, "--data": "imagefolder:none", "--blend": "0", "--model": "ViT-B-61", "--pretrained": "no"}
    for argument, value in wrong.items():
        assert f"error {argument}" in fails(["tune", "--out", folder, argument, value], capsys)
    assert "contains an earlier run" in fails(["tune", "--out", folder, "--epochs", "1"], capsys)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "text"), [("config.yaml", "seed: 3"), ("config.yaml", "a: ["), ("report.html", "<p>")]
)
def test_out_keeps_files_of_no_run(tmp_path, name, text, capsys):
    (tmp_path / name).write_text(text)
    for flag in ([], ["--overwrite"]):
        message = fails(["tune", "--shots", "1", "--max-classes", "6", "--out", tmp_path, *flag], capsys)
        assert f"{tmp_path} contains files with names of run files, but no config.yaml of a run: {name}" in message
        assert "--overwrite" not in message and "--resume" not in message
    fails(["tune", "--resume", tmp_path], capsys)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: text}


@pytest.mark.parametrize(
    ("command", "place"), [(["tune", "--out"], "photos/runs/a"), (["tune", "--out"], "link/a"),
                           (["tune", "--cache"], "photos")],
)  # fmt: skip
def test_output_refuses_folder_of_images(tmp_path, monkeypatch, capsys, command, place):
    monkeypatch.chdir(tmp_path)
    make_folders(tmp_path / "photos", {"cat": 4, "dog": 4})
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))
    said = fails([*command, place, "--data", "imagefolder:photos", "--shots", "1"], capsys)
    assert f"{place} is in the folder of the images" in said and "choose another folder." in said
    assert sorted(tmp_path.rglob("*")) == before


# ---- weights ---------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (open, ("boom", "w"))


def changed_weights(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: value for name, value in (pictogram_tiny.state_dict() | changes).items() if value is not None}


OTHER = "not usable as weights of this model: they are those of another "
WEIGHTS: list[tuple[object, str]] = [
    ([1], "not usable as weights"),
    ({"state_dict": {}}, "not usable as weights"),
    ({"weight": torch.zeros(2)}, "not usable as weights"),
    ({"state_dict": Bomb()}, "not usable as weights"),
    (changed_weights(positional_embedding=torch.zeros(32, 80)), f"{OTHER}(text pos_embed width changed!"),
    (changed_weights(**{"ln_final.weight": torch.zeros(80)}), f"{OTHER}(size mismatch for ln_final.weight"),
    (changed_weights(text_projection=None), f'{OTHER}(Missing key(s) in state_dict: "text_projection"'),
]


@pytest.mark.parametrize(
    ("content", "words"), WEIGHTS, ids=["list", "empty", "other", "code", "width", "size", "missing"]
)
def test_load_weights_refuses(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "model.pt")
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        load_weights(pictogram_tiny.load()[0], tmp_path / "model.pt")
    assert "\n" not in str(caught.value) and (OTHER not in words or "Pass the `model` of" in str(caught.value))
    assert not (tmp_path / "boom").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of torch.jit
def test_load_weights_refuses_torchscript_without_advice_to_run_it(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-L-14.pt")
    with pytest.raises(InputError, match="it is a TorchScript archive, which holds code") as error:
        load_weights(pictogram_tiny.load()[0], tmp_path / "ViT-L-14.pt")
    assert "weights_only" not in str(error.value)


def test_check_activation_accepts_one_model_per_tag():
    """If no model of the same shape has the activation of a tag, as for roberta-ViT-B-32, the tag is accepted."""
    refused, accepted = set(), set()
    for model, tag in open_clip.list_pretrained():
        try:
            check_activation(model, tag)
            accepted.add((model.removesuffix("-quickgelu"), tag))
        except InputError:
            refused.add((model, tag))
    assert ("roberta-ViT-B-32", "laion2b_s12b_b32k") in accepted and len(refused) > 10
    assert {(model.removesuffix("-quickgelu"), tag) for model, tag in refused} <= accepted


@pytest.mark.parametrize(
    "arguments", ["--model ViT-B-32 --pretrained laion2b_s34b_b79k", "--model hf-hub:org/none", "--data hf:org/none"]
)
def test_download_without_network(monkeypatch, tmp_path, capsys, arguments):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of huggingface_hub, before another attempt
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    flag, *words = arguments.split()
    if flag == "--data":
        pytest.importorskip("datasets")
    said = fails(["tune", flag, *words, "--out", tmp_path / "run"], capsys)
    assert said.startswith(f"error {flag}: ") and "network available?" in said
