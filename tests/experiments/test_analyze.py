"""`skipkernels analyze`: its files, tables, and errors."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from skipkernels.cli.main import main
from skipkernels.data import load_task
from skipkernels.experiments.sensitivity import measure_gradient_dependence
from skipkernels.tuner.model import load_model

SMALL = {"shots": 2, "classes": 12, "epochs": 1, "images": 10, "device": "cpu"}
FILES = ["analysis.json", "feature_sensitivity.svg", "gradient_dependence.svg"]


def run(out, *flags: str, **changes) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    options = [
        word for name, value in (SMALL | changes).items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(["analyze", "--out", str(out), *options, *flags])
    return code, stdout.getvalue(), stderr.getvalue()


def analyzed(out, *flags: str, **changes) -> tuple[str, str]:
    """Standard output and standard error of the command, which must succeed."""
    code, stdout, stderr = run(out, *flags, **changes)
    assert code == 0, stderr
    return stdout, stderr


def refused(out, *flags: str, code: int = 2, **changes) -> str:
    """Error of the command in one line."""
    found, _, stderr = run(out, *flags, **changes)
    assert found == code
    return " ".join(stderr.split())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Folder, standard output and standard error of an analysis."""
    folder = tmp_path_factory.mktemp("analysis") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        return folder, *analyzed(folder)


@pytest.fixture(scope="module")
def written(done):
    return json.loads((done[0] / "analysis.json").read_text())


def test_analyze_files(done, written):
    folder, _, _ = done
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert written["settings"]["text_lr"] == 5e-4, "resolved: that of full fine-tuning"
    assert written["settings"]["classes"] == 12 and "out" not in written["settings"]
    sensitivity = written["feature_sensitivity"]
    assert [len(sensitivity[name]) for name in ("image", "image_added", "text", "text_added")] == [6, 6, 4, 4]
    assert all(
        0 < value < 1 for name in ("image", "text") for value in (*sensitivity[name], sensitivity[f"{name}_entered"])
    )
    dependence = written["gradient_dependence"]
    assert (
        len(dependence["share"]) == 6
        and dependence["cumulative"][-1] == pytest.approx(1)
        and dependence["images"] == 10
    )
    assert written["advice"]["other"]["skip_layers"] == [3, 2]


def test_analyze_gradient_dependence_before_tuning(written):
    device = torch.device("cpu")
    model, transform, tokenizer = load_model("glyph-tiny", None, device)
    task = load_task("glyphs", protocol="base-to-new", shots=2, classes=12, seed=0, transform=transform)
    images, labels = zip(*(task.train[item * 12 // 10] for item in range(10)), strict=True)
    with torch.no_grad():
        image = model.encode_image(torch.stack(images))
        text = model.encode_text(tokenizer(task.tests[0].prompts[0]))
    dependence = measure_gradient_dependence(image, text, torch.tensor(labels), model.logit_scale.exp().item())
    assert written["gradient_dependence"]["share"] == pytest.approx(dependence.share.tolist(), rel=1e-4, abs=1e-9)


def test_analyze_plots_are_standalone_svg(done):
    for name in ("feature_sensitivity.svg", "gradient_dependence.svg"):
        text = (done[0] / name).read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<image" not in text and not re.search(r'href="(?!#)', text)


def test_analyze_output(done, written):
    _, out, err = done
    sensitivity, dependence = written["feature_sensitivity"], written["gradient_dependence"]
    assert f"{100 * sensitivity['image'][5]:.2f} %" in out and f"{100 * sensitivity['text_added'][0]:.2f} %" in out
    assert f"{100 * dependence['cumulative'][1]:.2f} %" in out
    advised = written["advice"]["advised"]
    command = (
        f"skipkernels tune --skip-layers {written['advice']['skip_share']:g} --keep-ratio {advised['keep_ratio']:g}"
    )
    assert command in out
    assert all(note in out for note in written["advice"]["notes"])
    assert all(bar in err for bar in ("gradients", "fine-tuning", "hidden states")) and "100%" in err
    assert "12 of 252 classes" in err


def test_analyze_same_seed_same_files(done, tmp_path):
    folder, _, _ = done
    analyzed(tmp_path)
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in FILES)


def test_analyze_few_shot_uses_all_classes(tmp_path):
    analyzed(tmp_path, "--template", "the sign {}.", protocol="few-shot")
    written = json.loads((tmp_path / "analysis.json").read_text())
    assert len(written["gradient_dependence"]["share"]) == 12


def test_analyze_overwrite(done, written, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "copy")
    assert re.search("--out: .* holds an earlier analysis .*--overwrite", refused(folder))
    assert all((folder / name).read_bytes() == (done[0] / name).read_bytes() for name in FILES)
    analyzed(folder, "--overwrite", seed=1)
    other = json.loads((folder / "analysis.json").read_text())
    assert other["feature_sensitivity"] != written["feature_sensitivity"], "another seed gives others"


def test_analyze_full_disk_keeps_the_earlier_analysis(done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "copy")
    before = {path.name: path.read_text() for path in folder.iterdir()}

    def full(file, text, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "can't be written: No space left" in refused(folder, "--overwrite")
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_analyze_diverged_fine_tuning_writes_nothing(tmp_path):
    assert "ower --text-lr" in refused(tmp_path / "run", code=1, text_lr=1e30, image_lr=1e30)
    assert not (tmp_path / "run").exists()


def test_analyze_checks_settings_before_fine_tuning(tmp_path, monkeypatch):
    def trained(*_) -> None:
        pytest.fail("it trained")

    monkeypatch.setattr("skipkernels.experiments.sensitivity.analysis._fine_tune", trained)
    for changes in ({"skip_layers": 7}, {"keep_ratio": 0.0}):
        refused(tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "--images must be at least 1; got 0"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"data": "glyphs:none"}, "no block 'none'"),
        ({"model": "glyph-tinny"}, "did you mean glyph-tiny"),
        ({"skip_layers": 7}, "--skip-layers must be a whole number from 0 to 6"),
        ({"keep_ratio": 0.0}, "--keep-ratio must be above 0"),
        ({"text_lr": 0.0, "image_lr": 0.0}, "no block of the image tower changed"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_analyze_bad_input_writes_nothing(tmp_path, changes, message):
    assert message in refused(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_analyze_unwritable_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert re.search("--out: .*is a file", refused(file))
    assert "is not a writable folder" in refused(file / "below")
