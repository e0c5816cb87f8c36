"""Exports: their files, and what other libraries compute from them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.methods.registry import METHODS
from skipkernels.app.serve import to_onnx
from skipkernels.app.serve.exporting import Exported
from skipkernels.app.serve.loading import load_plain
from skipkernels.app.train import model_card, tune
from skipkernels.app.train.description import Description
from tests.app.serve.conftest import ATOL, CONFIG, card_names, rotated


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    tune(dataclasses.replace(CONFIG, method="lora", shots=1, max_classes=4, out=folder))
    state = load_file(folder / "model.safetensors")
    assert any(name.endswith(".lora_B") and tensor.abs().max() > 0 for name, tensor in state.items())  # it was trained
    return folder


@pytest.fixture(params=["skip", "lora"])
def source(request, run, lora) -> Path:
    return run.folder if request.param == "skip" else lora


@torch.no_grad()
def test_open_clip(source, images, tmp_path):
    done = sk.export(source, "open-clip", tmp_path / "out")
    files = ["README.md", "classes.json", "classifier.json", "open_clip_config.json", "open_clip_model.safetensors"]
    assert done.files == files
    name = f"local-dir:{done.folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model, tokenizer = model.eval(), open_clip.get_tokenizer(name)
    tuned = sk.Classifier.load(source, device="cpu")
    image, text, scale = model(images, tokenizer([f"an icon of a {name}" for name in tuned.classes]))
    torch.testing.assert_close(scale * image @ text.T, tuned.logits(images), atol=ATOL, rtol=0)
    assert transform(Image.new("RGB", (40, 30), "red")).equal(tuned.transform(Image.new("RGB", (40, 30), "red")))
    exported = sk.Classifier.load(done.folder, device="cpu")
    torch.testing.assert_close(exported.logits(images), tuned.logits(images), atol=ATOL, rtol=0)
    assert main(["export", str(done.folder), "--to", "open-clip", "--out", str(tmp_path / "again")]) == 0


HEADED = {name: {"method": name} for name, method in METHODS.items() if "head_code" in vars(method)}
HEADED |= {"linear-probe": {"method": "linear-probe"}}
HEADED |= {"skip, gaussian": {"method": "skip", "head": "gaussian"}, "lora, probe": {"method": "lora", "head": "probe"}}


@pytest.fixture(scope="module", params=HEADED)
def head_run(request, native_run, tmp_path_factory) -> Path:
    """A run, with a temperature, with weights for which a CLIP has no place."""
    folder = tmp_path_factory.mktemp("head") / "run"
    changes = HEADED[request.param] | {
        "epochs": None if request.param == "linear-probe" else 1,
        "model": f"local-dir:{native_run}",
        "max_classes": 4,
        "out": folder,
    }
    tune(dataclasses.replace(CONFIG, **changes))
    values = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(values | {"temperature": 0.7}))
    return folder


def probabilities_of(folder: Path, picture: Path) -> torch.Tensor:
    classifier = sk.Classifier.load(folder, device="cpu", trust=True)
    found = classifier.predict([picture], top=9)
    assert classifier.calibrated and len(found.ids[0]) == 2
    return found.probabilities[0][found.ids[0].argsort()]


@torch.no_grad()
@pytest.mark.parametrize("to", ["open-clip", "hugging-face"])
def test_head_is_exported_beside_the_model(to, head_run, run, tmp_path):
    """The code of the model card gives the probabilities of the Classifier."""
    if to == "hugging-face":
        pytest.importorskip("transformers")
    picture = rotated(run.task.tests[0].images[0][0].resize((16, 16)), tmp_path / "photo.png")
    done = sk.export(head_run, to, tmp_path / "out", trust=True)
    assert "head.safetensors" in done.files
    headed = json.loads((head_run / "classifier.json").read_text())["head_xxh3"] is not None
    assert ("classifier.json" in done.files) == (to == "open-clip" and headed)
    if "classifier.json" in done.files:
        own, exported = (probabilities_of(folder, picture) for folder in (head_run, done.folder))
        torch.testing.assert_close(exported, own, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        card_names(done, picture)["probabilities"][0], probabilities_of(head_run, picture), atol=1e-5, rtol=0
    )


@pytest.fixture
def photo(run, tmp_path) -> Path:
    """An image of another shape than the model's."""
    run.task.tests[0].images[0][0].resize((40, 25)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@torch.no_grad()
def test_onnx_module_gives_the_probabilities(head_run, photo):
    """Its logits are divided by the temperature."""
    pixels = sk.Classifier.load(head_run, device="cpu", trust=True).transform(Image.open(photo))[None]
    logits, _ = to_onnx.ImageClassifier(load_plain(head_run, trust=True))(pixels)
    torch.testing.assert_close(logits.softmax(1)[0], probabilities_of(head_run, photo), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("head_run", [*HEADED][1:2], indirect=True)  # the longest head: an export takes three seconds
def test_onnx_file_computes_the_module(head_run, photo, tmp_path):
    """Takes any number of images, has the classes and the preprocessing beside them, and no path of this machine."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    assert "down" in load_plain(head_run, trust=True).method.head().state_dict(), "the longest head"
    done = sk.export(head_run, "onnx", tmp_path / "out", trust=True)
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    pixels = sk.Classifier.load(head_run, device="cpu", trust=True).transform(Image.open(photo))[None]
    for batch in (pixels, torch.cat([pixels, -pixels, pixels])):
        logits, embedding = map(torch.from_numpy, session.run(None, {"pixel_values": batch.numpy()}))
        expected = to_onnx.ImageClassifier(load_plain(head_run, trust=True))(batch)
        torch.testing.assert_close(logits, expected[0], atol=ATOL, rtol=0)
        torch.testing.assert_close(embedding, expected[1], atol=1e-5, rtol=0)
    by_card = torch.from_numpy(card_names(done, photo)["logits"]).softmax(1)[0]
    torch.testing.assert_close(by_card, probabilities_of(head_run, photo), atol=1e-5, rtol=0)
    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert len(metadata["classes"]) == 2 and "temperature" not in metadata, "the logits are divided by it"
    assert metadata["preprocessing"]["size"] == [16, 16] and metadata["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    content = (done.folder / "model.onnx").read_bytes()
    assert b"site-packages" not in content and str(Path(sk.__file__).parents[1]).encode() not in content
    check_files(done, photo)


def test_failed_export_leaves_no_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Description, "write", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sk.export(run.folder, "open-clip", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_weights_are_those_of_the_names(run, lora, images, tmp_path):
    """Even if a model was copied over another: the digest chooses the file."""
    done = sk.export(lora, "open-clip", tmp_path / "out")
    exported = sk.Classifier.load(done.folder, device="cpu")
    mixed = shutil.copytree(run.folder, tmp_path / "mixed")
    shutil.copytree(done.folder, mixed, dirs_exist_ok=True)
    found = sk.Classifier.load(mixed, device="cpu")
    assert found.classes == exported.classes != run.classes
    assert torch.equal(found.logits(images), exported.logits(images))


def test_overwrite_replaces_an_earlier_export_of_another_target(native_run, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "out" / ".git").mkdir(parents=True)
    (tmp_path / "out" / ".git" / "HEAD").write_text("main")
    for target in ("hugging-face", "open-clip"):
        done = sk.export(native_run, target, tmp_path / "out", overwrite=True)
        assert {path.name for path in done.folder.iterdir()} == {".git", *done.files}
    assert (done.folder / ".git" / "HEAD").read_text() == "main"


@pytest.mark.parametrize("to", ["open-clip", "hugging-face"])  # and ONNX in test_onnx
def test_files_are_readable_and_named_by_the_card(to, native_run, tmp_path, monkeypatch):
    pytest.importorskip({"hugging-face": "transformers"}.get(to, "open_clip"))
    monkeypatch.setattr(model_card, "_SHOWN", 1)
    (tmp_path / "plain").touch()
    check_files(sk.export(native_run, to, tmp_path / "out"), tmp_path / "plain")


def check_files(done: Exported, ordinary: Path) -> None:
    """Files have the permissions of an ordinary file, and those that the card names exist."""
    assert {(done.folder / name).stat().st_mode for name in done.files} == {ordinary.stat().st_mode}
    card = (done.folder / "README.md").read_text()
    named = re.findall(r"\b[\w.]+\.(?:json|onnx|safetensors)\b", card)
    assert named and set(named) <= set(done.files)
    assert "- Training images: 4 of `pictograms:food`, at most 2 images of each class" in card


@pytest.mark.parametrize("to", ["open-clip", "hugging-face"])
def test_no_local_paths(to, native_run, tmp_path):
    """No byte of an export has a path of the run, its settings, or the package."""
    if to == "hugging-face":
        pytest.importorskip("transformers")
    source = tmp_path / "M4RKER" / "run"
    shutil.copytree(native_run, source)
    place = str(tmp_path / "M4RKER-place")
    settings, hints = yaml.safe_load((source / "config.yaml").read_text()), get_type_hints(TuneConfig)
    settings |= {name: place for name, hint in hints.items() if Path in get_args(hint)}
    settings |= {"data": f"imagefolder:{place}", "model": f"local-dir:{place}", "pretrained": f"{place}.pt"}
    settings |= {"dataset_identity": place}
    (source / "config.yaml").write_text(yaml.safe_dump(settings))
    described = json.loads((source / "classifier.json").read_text())
    described |= {name: settings[name] for name in ("data", "model", "pretrained")}
    described["preprocessing"]["name"] = place
    (source / "classifier.json").write_text(json.dumps(described))
    metrics = json.loads((source / "metrics.json").read_text()) | {"command": f"skipkernels tune --out {place}"}
    (source / "metrics.json").write_text(json.dumps(metrics))
    done = sk.export(source, to, tmp_path / "M4RKER-out")
    home = str(Path(sk.__file__).parent.parent)
    for path in done.folder.rglob("*"):
        content = path.read_bytes()
        assert not any(word.encode() in content for word in ("M4RKER", home, "site-packages")), path
    card = (done.folder / "README.md").read_text()
    assert "tuned on imagefolder" in card and "--data imagefolder:PATH" in card and "--shots 2" in card
