"""`skipkernels rank`: uncertain and diverse images, and training images with a wrong label."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.serve.ranking import farthest_first, leave_one_out
from skipkernels.app.train import tune
from tests.app.runs import fails
from tests.app.serve.conftest import CONFIG


@pytest.fixture(scope="module")
def classifier(run) -> sk.Classifier:
    return sk.Classifier.load(run.folder, device="cpu")


@pytest.fixture
def loaded(classifier, monkeypatch) -> None:
    """The classifier is not loaded again."""
    monkeypatch.setattr(sk.Classifier, "load", lambda *_, **options: classifier)


def command(capsys, *arguments) -> tuple[int, list[dict[str, str]], str]:
    code = main(["rank", *map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, list(csv.DictReader(io.StringIO(captured.out))), captured.err


def test_uncertainty(run, photos, classifier, loaded, capsys):
    code, rows, err = command(capsys, run.folder, photos, "--count", 5)
    found = classifier.predict(photos, top=2, unreadable="skip")
    margins = found.probabilities[:, 0] - found.probabilities[:, 1]
    expected = [found.names[index] for index in margins.argsort()[:5]]
    assert code == 1 and "broken.jpg" in err and "skipped files that are not images: .txt 1" in err
    assert [row["path"] for row in rows] == expected and [row["rank"] for row in rows] == list("12345")
    assert [float(row["score"]) for row in rows] == pytest.approx((1 - margins.sort().values[:5]).tolist(), abs=1e-5)
    labels = dict(found)
    for row in rows:
        label, probability = labels[row["path"]][0]
        assert row["label"] == label and float(row["probability"]) == pytest.approx(probability, abs=1e-5)


def test_diversity(run, photos, loaded, capsys, tmp_path):
    """Copies of training images are known already, a copy of another image is chosen last."""
    for number in range(3):
        run.task.train[number][0].save(tmp_path / f"known-{number}.png")
        run.task.tests[0].images[number][0].save(tmp_path / f"new-{number}.png")
    run.task.tests[0].images[0][0].save(tmp_path / "copy.png")
    (tmp_path / "broken.png").touch()
    code, rows, err = command(capsys, run.folder, tmp_path, "--by", "diversity")
    names = [Path(row["path"]).stem for row in rows]
    assert code == 1 and err.count("broken.png") == 1 and "starting from the training images" in err
    assert {name[:3] for name in names[:3]} <= {"new", "cop"} and len(names) == 7
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and scores[2] > 0.1 and scores[3] == pytest.approx(0, abs=1e-4)


def test_diversity_without_the_training_images(run, photos, loaded, capsys, monkeypatch):
    from skipkernels.app.data import InputError
    from skipkernels.app.serve import embedded_images

    def missing(*_, **options):
        raise InputError("no folder photos")

    monkeypatch.setattr(embedded_images, "find_training_images", missing)
    code, rows, err = command(capsys, run.folder, photos / "part1", "--by", "diversity", "--count", 3)
    assert code == 0 and rows[0]["score"] == "" and float(rows[1]["score"]) >= float(rows[2]["score"]) > 0
    assert "without the training images: no folder photos" in err


def test_farthest_first_by_hand():
    points = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    order, distances = farthest_first(points, points[:1], 9)
    assert order == [3, 2, 1, 0] and distances == pytest.approx([2, 1, 0.2, 0])
    order, distances = farthest_first(points, None, 3)  # the mean is (0.2, 0.4)
    assert order == [1, 3, 2] and math.isnan(distances[0]) and distances[1:] == pytest.approx([1.8, 0.4])


def test_leave_one_out_is_the_vote_of_the_others():
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(2051, 4, generator=generator), torch.arange(2051) % 3
    labels[:2] = torch.tensor([3, 4])  # the only ones of their classes
    found = leave_one_out(embeddings, labels, 6)
    assert found[:2].isnan().all() and not found[2:].isnan().any()
    centred = torch.nn.functional.normalize(embeddings - embeddings.mean(dim=0), dim=1).double()
    for image in (2, 1024, 2050):  # in each block
        others = torch.arange(2051) != image
        votes = (10 * centred @ centred[image]).exp()
        of_class = torch.stack([votes[others & (labels == label)].mean().nan_to_num() for label in range(6)])
        torch.testing.assert_close(found[image], (of_class / of_class.sum()).float(), atol=1e-5, rtol=1e-3)


SHAPES = {
    "circle": lambda draw, box, colour: draw.ellipse(box, fill=colour),
    "ring": lambda draw, box, colour: draw.ellipse(box, outline=colour, width=3),
    "square": lambda draw, box, colour: draw.rectangle(box, fill=colour),
    "triangle": lambda draw, box, colour: draw.polygon([box[:2], box[2:], (box[0], box[3])], fill=colour),
    "stripes": lambda draw, box, colour: [draw.line((0, y, 64, y), colour, 3) for y in range(0, 64, 12)],
}


def drawings(count: int) -> Iterator[tuple[str, Image.Image]]:
    """Shapes of random sizes, places and colours."""
    random_numbers = random.Random(0)
    for name, draw in SHAPES.items():
        for _ in range(count):
            light, dark = (tuple(random_numbers.choices(values, k=3)) for values in (range(150, 256), range(140)))
            x, y, size = random_numbers.randrange(32), random_numbers.randrange(32), random_numbers.randrange(18, 30)
            image = Image.new("RGB", (64, 64), light)
            draw(ImageDraw.Draw(image), (x, y, x + size, y + size), dark)
            yield name, image


def test_flipped_labels_are_suspects(tmp_path, capsys):
    """Five of 100 drawings get a wrong label; at least 4 of them are among the first 5 of the list."""
    random_numbers, flipped = random.Random(1), set()
    for number, (name, image) in enumerate(drawings(20)):
        given = name
        if number % 20 == 7:
            given = random_numbers.choice([other for other in SHAPES if other != name])
            flipped.add(f"{number}.png")
        folder = tmp_path / "drawings" / given
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    data = f"imagefolder:{tmp_path / 'drawings'}"
    changes = {"shots": "all", "max_classes": None, "epochs": 1, "validation": "none", "test": "none"}
    tune(dataclasses.replace(CONFIG, data=data, out=tmp_path / "run", **changes))
    out, sheet = tmp_path / "list.csv", tmp_path / "sheet.html"
    options = ["--by", "suspects", "--count", 10, "--out", out, "--sheet", sheet]
    code, _, err = command(capsys, tmp_path / "run", *options)
    rows = list(csv.DictReader(out.open()))
    assert code == 0 and "10 of 100 training images listed, by suspects\n" in err
    names = [Path(row["path"]).name for row in rows]
    assert len(flipped & set(names[:5])) >= 4
    for row in rows:
        assert (tmp_path / "drawings" / row["path"]).is_file() and Path(row["path"]).parent.name == row["given"]
    assert rows[0]["label"] != rows[0]["given"]
    page = sheet.read_text()
    assert page.count('<img alt="') == 10 and f"--out {out}" in page and 'src="data:image/png' in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "IMAGES must be files or folders of images; got none"),
        (["{run}", "{photos}", "--by", "suspects"], "IMAGES must be left out with --by suspects"),
        (["{run}", "{photos}", "--count", "0"], "--count must be a whole number of at least 1; got 0"),
        (["{run}", "{photos}", "--out", "{tmp}/a.json"], "--out must end in .csv; got"),
        (["{run}", "{photos}", "--sheet", "{tmp}/a.png"], "--sheet must end in .html; got"),
    ],
)
def test_command_errors(run, photos, loaded, tmp_path, capsys, arguments, message):
    filled = [word.format(run=run.folder, photos=photos, tmp=tmp_path) for word in arguments]
    assert message in fails(["rank", *filled], capsys)
    assert not list(tmp_path.iterdir())
