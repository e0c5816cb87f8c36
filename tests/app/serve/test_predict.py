"""Classification from a run folder, in Python and from the command line."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import itertools
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.data import open_source
from skipkernels.app.methods.skip import Skip
from skipkernels.app.serve.output import NONE
from skipkernels.app.train import tune
from skipkernels.app.train.setup import build_task
from skipkernels.formatting import csv_line, csv_text
from tests.app.serve.conftest import CONFIG


def label_of(name: str) -> int:
    return int(Path(name).name.split("-")[0])


def test_accuracy_is_that_of_the_run(run, photos, classifier):
    found = classifier.predict(photos, unreadable="skip")
    assert len(found) == len(run.task.tests[0].images)
    assert [Path(name).name for name in found.unreadable] == ["broken.jpg"]
    correct = [label_of(name) == row[0] for name, row in zip(found.names, found.ids.tolist(), strict=True)]
    assert 100 * sum(correct) / len(correct) == pytest.approx(run.metrics["tuned"]["base"], abs=1e-3)


def test_inputs_of_each_kind_agree(photos, classifier):
    paths = sorted((photos / "part0").iterdir())[:5]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    rgba = [np.dstack([array, np.full_like(array[..., 0], 7)]) for array in arrays]
    expected = classifier.predict(torch.stack([classifier.transform(picture) for picture in pictures]), top=3)
    assert expected.ids.shape == (5, 3)
    kinds = {"paths": paths, "pictures": pictures, "arrays": arrays, "tensors": tensors, "RGBA": rgba}
    mixed = [str(paths[0]), pictures[1], arrays[2], tensors[3], rgba[4]]
    for kind, inputs in (kinds | {"mixed": mixed, "one array": np.stack(arrays)}).items():
        found = classifier.predict(inputs, top=3, batch_size=2)
        assert torch.equal(found.ids, expected.ids), kind
        torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-5, rtol=0)
    for kind, inputs in kinds.items():  # a single image
        assert torch.equal(classifier.predict(inputs[1], top=3).ids, expected.ids[1:2]), kind
    grey = pictures[0].convert("L")
    assert torch.equal(classifier.predict(np.asarray(grey)).probabilities, classifier.predict(grey).probabilities)
    assert classifier.predict(paths).names == list(map(str, paths))
    assert len(classifier.predict([])) == 0


def test_predictions_are_a_sequence_that_sums_to_one(run, images, classifier):
    every = classifier.predict(images, top=99)
    assert every.ids.shape == (len(images), len(run.classes))
    torch.testing.assert_close(every.probabilities.sum(1), torch.ones(len(images)))
    assert [every[n] for n in range(len(every))] == list(every) and every[-1] == list(every)[-1]


@pytest.fixture(scope="module")
def calibrated(run, tmp_path_factory) -> Path:
    """Folder of the run with a temperature of 2."""
    folder = shutil.copytree(run.folder, tmp_path_factory.mktemp("calibrated") / "run")
    values = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(values | {"temperature": 2.0}))
    return folder


def test_temperature_divides_the_logits(calibrated, images, classifier):
    found = sk.Classifier.load(calibrated, device="cpu").predict(images, top=99)
    expected = (classifier.logits(images) / 2).softmax(1).sort(1, descending=True).values
    torch.testing.assert_close(found.probabilities, expected)


def test_temperature_is_that_of_the_classes_and_prompts_of_the_run(run, calibrated):
    """The classes in any order, and in other spellings."""
    underscores = [name.replace(" ", "_") for name in run.classes]
    for options, same in (
        ({}, True),
        ({"classes": run.classes[::-1]}, True),
        ({"classes": underscores}, True),
        ({"classes": ["alpha", *run.classes]}, False),
        ({"templates": ["a {}."]}, False),
    ):
        found = sk.Classifier.load(calibrated, device="cpu", **options)
        assert (found.calibrated, found.temperature) == ((True, 2) if same else (False, 1)), options
    assert sk.Classifier.load(calibrated, device="cpu", classes=underscores).classes == run.classes


def test_classifier_and_predictions_say_whether_they_are_calibrated(calibrated, classifier, images):
    own = sk.Classifier.load(calibrated, device="cpu")
    assert "20 classes" in repr(own) and "calibrated, cpu" in repr(own) and "not calibrated" not in repr(own)
    found = own.predict(images, top=2, threshold=0.5)
    assert found.calibrated
    assert repr(found) == "Predictions(4 images, top 2 of 20 classes, threshold 0.5, calibrated)"
    assert "not calibrated" in repr(classifier)
    assert repr(classifier.predict(images, top=2)) == "Predictions(4 images, top 2 of 20 classes, not calibrated)"


def test_run_opens_in_a_new_process(run):
    """Nothing else has registered the image tower of the packaged model there."""
    code = "import sys, skipkernels as sk; print(len(sk.Classifier.load(sys.argv[1], device='cpu').classes))"
    done = subprocess.run([sys.executable, "-c", code, run.folder], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(run.classes)}\n"


def test_other_classes_by_their_names(run, photos):
    new = run.task.tests[1]
    found = sk.Classifier.load(run.folder, classes=new.classes, device="cpu").predict(
        [image for image, _ in new.images]
    )
    correct = (found.ids[:, 0] == torch.tensor(new.images.labels)).float().mean().item()
    assert 100 * correct == pytest.approx(run.metrics["tuned"]["new"], abs=1e-3)


def test_logits_that_are_not_finite_name_the_image(images, classifier, monkeypatch):
    embed = Skip.embed
    monkeypatch.setattr(Skip, "embed", lambda self, x: embed(self, x) * torch.tensor([[1], [1], [torch.nan], [1]]))
    with pytest.raises(FloatingPointError, match="logits of image 2 are not finite"):
        classifier.predict(images)


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["predict", *map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_prints_the_best_classes(run, photos, capsys):
    code, out, err = command(capsys, run.folder, photos, "--top", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 1 and "skipped" in err and "broken.jpg" in err  # the damaged file is named
    assert "skipped files that are not images: .txt 1\n" in err
    assert list(rows[0]) == ["path", "label", "probability", "label_2", "probability_2"]
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)
    assert len(rows) == len(run.task.tests[0].images)


def test_command_writes_each_image_once(run, photos, tmp_path, capsys):
    part, table = photos / "part1", tmp_path / "found.csv"
    printed = command(capsys, run.folder, part)[1]
    assert command(capsys, run.folder, part, *part.iterdir(), "--out", table)[0] == 0
    assert table.read_text() == printed and printed.count("\n") == 1 + len(list(part.iterdir()))


def test_command_takes_classes_from_a_list_or_a_file(run, photos, tmp_path, capsys):
    part, names = photos / "part1", tmp_path / "names.txt"
    names.write_text("alpha\n\nbeta\n")
    long = "alpha, beta" + 200 * ", "  # longer than a file name may be
    outputs = {command(capsys, run.folder, part, "--classes", value)[1] for value in (long, names)}
    assert len(outputs) == 1 and outputs.pop().count(",alpha,") == len(list(part.iterdir()))
    said = command(capsys, run.folder, part, "--classes", names, "--template", "a {}", "--top", 9)[2]
    assert said.endswith("probabilities are not calibrated: --classes and --template replace those of the run\n")


def test_embeddings_are_those_of_the_rows(run, photos, classifier, tmp_path, capsys):
    """In the order of predictions.csv, which leaves out the damaged file."""
    table, array = tmp_path / "found.csv", tmp_path / "found.npy"
    assert command(capsys, run.folder, photos, "--batch-size", 5, "--out", table, "--embeddings", array)[0] == 1
    rows, embeddings = list(csv.DictReader(table.open())), np.load(array)
    assert embeddings.dtype == np.float32 and len(embeddings) == len(rows) == len(run.task.tests[0].images)
    for index in (0, 7, len(rows) - 1):  # of the first, the second and the last batch
        with Image.open(rows[index]["path"]) as image:
            expected = classifier.embed(classifier.transform(image.convert("RGB"))[None])[0]
        np.testing.assert_allclose(embeddings[index], expected, atol=1e-6)  # another size of the batch
    assert classifier.predict([photos / "broken.jpg"], unreadable="skip").embeddings.shape == (0, *expected.shape)


def test_thresholds_keep_the_share_of_validation_images_that_is_reported(tmp_path):
    config = dataclasses.replace(CONFIG, validation=0.5, out=tmp_path / "run")
    thresholds = tune(config)["validation"]["thresholds"]
    held = build_task(config.resolved()).validation.images
    classifier = sk.Classifier.load(tmp_path / "run", device="cpu")
    reached = [row for row in thresholds if row["threshold"] is not None]
    assert reached and classifier.none_logit is not None
    for row in reached:
        found = classifier.predict([image for image, _ in held], threshold=row["threshold"])
        assert 100 * found.known.double().mean().item() == pytest.approx(row["coverage"], abs=1e-3)
        right = (found.ids[:, 0] == torch.tensor(held.labels))[found.known]
        assert 100 * right.double().mean().item() == pytest.approx(row["accuracy"], abs=1e-3)
    assert f"Measured on {len(held)} validation images" in (tmp_path / "run" / "report.html").read_text()
    others = sk.Classifier.load(tmp_path / "run", classes=["a", "b"], device="cpu")
    assert others.none_logit is None


def test_command_with_a_threshold(run, photos, tmp_path, capsys):
    part = photos / "part1"
    plain = list(csv.DictReader(io.StringIO(command(capsys, run.folder, part, "--top", 2)[1])))
    threshold = sorted(float(row["probability"]) for row in plain)[len(plain) // 2]
    options = ["--top", 2, "--threshold", threshold - 1e-5]
    code, out, err = command(capsys, run.folder, part, *options)
    command(capsys, run.folder, part, *options, "--out", tmp_path / "known.csv")
    assert (tmp_path / "known.csv").read_text() == out
    rows = list(csv.DictReader(io.StringIO(out)))
    below = [float(row["probability"]) < threshold - 1e-5 for row in plain]
    assert code == 0 and 0 < sum(below) < len(rows) and f"classified, {sum(below)} as {NONE};" in err
    for row, before, none in zip(rows, plain, below, strict=True):  # without validation images, the same probabilities
        best = {"label_2": before["label"], "probability_2": before["probability"]}
        expected = before | {"label": NONE, "probability": ""} | best if none else before
        assert row == expected | {"known": "false" if none else "true"}
    known = sk.Classifier.load(run.folder, device="cpu").predict(part, threshold=threshold - 1e-5).known
    assert known.tolist() == [not none for none in below]


def test_class_named_none_is_not_counted_as_none(run, photos, capsys):
    err = command(capsys, run.folder, photos / "part1", "--classes", f"{NONE}, beta", "--threshold", 0)[2]
    assert f"classified, 0 as {NONE};" in err


def test_command_writes_what_is_done_after_an_error(run, photos, tmp_path, capsys, monkeypatch):
    """Embeddings of the third batch are not finite."""
    out, embed, calls = tmp_path / "found.csv", Skip.embed, itertools.count(1)
    monkeypatch.setattr(Skip, "embed", lambda self, x: embed(self, x) * (torch.nan if next(calls) == 3 else 1))
    files = ["--out", out, "--embeddings", tmp_path / "found.npy"]
    code, _, err = command(capsys, run.folder, photos, "--batch-size", 4, *files)
    done = len(list(csv.DictReader(out.open())))
    assert code == 1 and f"{done} of {len(run.task.tests[0].images) + 1} images are classified" in err
    assert done == len(np.load(tmp_path / "found.npy")) and 4 < done <= 8


def test_full_disk_for_embeddings_keeps_predictions(run, photos, tmp_path, capsys, monkeypatch):
    table, array = tmp_path / "found.csv", tmp_path / "found.npy"
    monkeypatch.setattr(np, "save", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    code, _, err = command(capsys, run.folder, photos / "part1", "--out", table, "--embeddings", array)
    assert code == 2 and f"error --embeddings: {array} can't be written: No space left on device." in err
    assert len(list(csv.DictReader(table.open()))) == len(list((photos / "part1").glob("*.*")))


def test_command_keeps_earlier_results_if_nothing_is_classified(run, photos, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    files = [tmp_path / "found.csv", tmp_path / "found.npy"]
    for file in files:
        file.write_text("earlier")
    monkeypatch.setattr(Skip, "embed", interrupted)
    code, printed, err = command(capsys, run.folder, photos, "--out", files[0], "--embeddings", files[1])
    assert code == 130 and "0 of" in err and [file.read_text() for file in files] == ["earlier", "earlier"]
    assert command(capsys, run.folder, photos)[1] == ""


def test_hostile_class_names(tmp_path, capsys, caplog):
    """Names of classes with escape sequences and formulas, from tune to predict and back as a table of images."""
    names = ["\x1b[31mred", "=cmd|' C calc'!A0"]
    for part, name, number in itertools.product(("train", "test"), range(2), range(2)):
        folder = tmp_path / "photos" / part / names[name]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (255 * name, 90 * number, 0)).save(folder / f"{number}.png")
    caplog.set_level(logging.INFO, "skipkernels")
    options = ["--method", "zero-shot", "--shots", "2", "--device", "cpu", "--out", tmp_path / "run"]
    assert main(["tune", "--data", f"imagefolder:{tmp_path / 'photos'}", *map(str, options)]) == 0
    images = str(tmp_path / "photos" / "test")
    assert main(["predict", str(tmp_path / "run"), images, "--out", str(tmp_path / "table.csv")]) == 0
    printed = capsys.readouterr()
    assert not any("\x1b" in text for text in (printed.out, printed.err, *caplog.messages))
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert {row["label"] for row in rows} | {row["label_2"] for row in rows} == {names[0], f"'{names[1]}"}
    source = open_source(f"csv:{tmp_path / 'table.csv'}")
    assert set(source.classes) <= set(names)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\t=1", "'=1", "''@", "'a", "a=1", ""])
def test_csv_line_has_no_formula(text):
    cell = next(csv.reader([csv_line([text, -0.5])]))[0]
    assert not cell.startswith(("=", "+", "-", "@", "\t")) and csv_text(cell) == text
    assert csv_line([text, -0.5]).endswith(",-0.5\n")
