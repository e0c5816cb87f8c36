"""The command: what it writes and prints, that it repeats, and that it leaves nothing half-written."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from skipkernels.cli import analyze as analyze_command
from skipkernels.cli.analyze import AnalyzeConfig, run
from skipkernels.data import InputError, load_task
from skipkernels.experiments.sensitivity import measure_gradient_dependence
from skipkernels.tuner.model import load_model

SMALL = AnalyzeConfig(shots=2, classes=12, epochs=1, images=10, device="cpu")
FILES = ["analysis.json", "feature_sensitivity.svg", "gradient_dependence.svg"]


def analyzed(out, **changes) -> tuple[str, str]:
    """What the command prints, to both streams."""
    texts = io.StringIO(), io.StringIO()
    consoles = [Console(file=text, width=160) for text in texts]
    assert run(dataclasses.replace(SMALL, out=out, **changes), *consoles) == 0
    return texts[0].getvalue(), texts[1].getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Folder, standard output and standard error of an analysis."""
    folder = tmp_path_factory.mktemp("analysis") / "new" / "folder"
    return folder, *analyzed(folder)


@pytest.fixture(scope="module")
def written(done):
    return json.loads((done[0] / "analysis.json").read_text())


def test_files(done, written):
    folder, _, _ = done
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert written["settings"]["text_lr"] == 5e-4, "resolved: that of full fine-tuning"
    assert written["settings"]["classes"] == 12 and "out" not in written["settings"]
    shift = written["feature_sensitivity"]
    assert [len(shift[name]) for name in ("image", "image_added", "text", "text_added")] == [6, 6, 4, 4]
    assert all(0 < value < 1 for name in ("image", "text") for value in (*shift[name], shift[f"{name}_entered"]))
    spread = written["gradient_dependence"]
    assert len(spread["share"]) == 6 and spread["cumulative"][-1] == pytest.approx(1) and spread["images"] == 10
    assert written["advice"]["other"]["skip_layers"] == [3, 2]


def test_the_gradient_is_that_of_the_model_as_it_came(written):
    device = torch.device("cpu")
    model, transform, tokenizer = load_model("glyph-tiny", None, device)
    task = load_task("glyphs", protocol="base-to-new", shots=2, classes=12, seed=0, transform=transform)
    images, labels = zip(*(task.train[item * 12 // 10] for item in range(10)), strict=True)
    with torch.no_grad():
        image = model.encode_image(torch.stack(images))
        text = model.encode_text(tokenizer(task.tests[0].prompts[0]))
    spread = measure_gradient_dependence(image, text, torch.tensor(labels), model.logit_scale.exp().item())
    assert written["gradient_dependence"]["share"] == pytest.approx(spread.share.tolist(), rel=1e-4, abs=1e-9)


def test_plots_are_svg_that_stand_alone(done):
    for name in ("feature_sensitivity.svg", "gradient_dependence.svg"):
        text = (done[0] / name).read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<image" not in text and not re.search(r'href="(?!#)', text)


def test_what_is_printed(done, written):
    _, out, err = done
    shift, spread = written["feature_sensitivity"], written["gradient_dependence"]
    assert f"{100 * shift['image'][5]:.2f} %" in out and f"{100 * shift['text_added'][0]:.2f} %" in out
    assert f"{100 * spread['cumulative'][1]:.2f} %" in out
    advised = written["advice"]["advised"]
    command = (
        f"skipkernels tune --skip-layers {written['advice']['skip_share']:g} --keep-ratio {advised['keep_ratio']:g}"
    )
    assert command in out
    assert all(note in out for note in written["advice"]["notes"])
    assert all(bar in err for bar in ("gradients", "fine-tuning", "hidden states")) and "100%" in err
    assert "12 of 252 classes" in err


def test_the_same_seed_gives_the_same_files(done, tmp_path):
    folder, _, _ = done
    analyzed(tmp_path)
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in FILES)


def test_few_shot_takes_all_classes(tmp_path):
    analyzed(tmp_path, protocol="few-shot", template=("the sign {}.",))
    written = json.loads((tmp_path / "analysis.json").read_text())
    assert len(written["gradient_dependence"]["share"]) == 12


def test_an_earlier_analysis_is_replaced_only_if_asked_for(done, written, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "copy")
    with pytest.raises(InputError, match="holds an earlier analysis .*--overwrite"):
        analyzed(folder)
    assert all((folder / name).read_bytes() == (done[0] / name).read_bytes() for name in FILES)
    analyzed(folder, overwrite=True, seed=1)
    other = json.loads((folder / "analysis.json").read_text())
    assert other["feature_sensitivity"] != written["feature_sensitivity"], "another seed gives others"


def test_a_disk_that_fails_leaves_no_analysis(done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "copy")
    replace_text = analyze_command.replace_text

    def full(path, text):
        if path.name == "gradient_dependence.svg":
            raise OSError(28, "No space left on device")
        replace_text(path, text)

    monkeypatch.setattr(analyze_command, "replace_text", full)
    with pytest.raises(InputError, match="can't be written: No space left"):
        analyzed(folder, overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == ["feature_sensitivity.svg", "gradient_dependence.svg"], (
        "it would be of other plots"
    )


def test_a_fine_tuning_that_diverges_writes_nothing(tmp_path):
    with pytest.raises(FloatingPointError, match="Lower `text_lr`"):
        analyzed(tmp_path / "run", text_lr=1e30, image_lr=1e30)
    assert not (tmp_path / "run").exists()


def test_what_the_advice_would_refuse_is_refused_before_the_fine_tuning(tmp_path, monkeypatch):
    def trained(*_) -> None:
        pytest.fail("it trained")

    monkeypatch.setattr("skipkernels.experiments.sensitivity.analysis._fine_tune", trained)
    for changes in ({"skip_layers": 7}, {"keep_ratio": 0.0}):
        with pytest.raises(InputError):
            analyzed(tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "--images must be at least 1; got 0"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"data": "glyphs:none"}, "no block 'none'"),
        ({"model": "glyph-tinny"}, "did you mean glyph-tiny"),
        ({"skip_layers": 7}, "skip_layers must be a whole number from 0 to 6"),
        ({"keep_ratio": 0.0}, "keep_ratio must be above 0"),
        ({"text_lr": 0.0, "image_lr": 0.0}, "no block of the image tower changed"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_writes_nothing(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        analyzed(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="out: .*is a file"):
        analyzed(file)
    with pytest.raises(InputError, match="is not a writable folder"):
        analyzed(file / "below")
