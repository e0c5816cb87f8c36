"""CLIP_benchmark loads the weights of a run as `--pretrained PATH`, and finds the accuracy of `skipkernels eval`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from skipkernels.app.config import TuneConfig
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.train import evaluate_run, tune

CLASSES = ["circle", "square", "triangle", "zigzag"]
COLOURS = [(220, 40, 40), (40, 200, 40), (40, 60, 220), (240, 240, 240)]
PER_CLASS = 9


def coloured(folder: Path) -> None:
    """Images of a class in a common colour. Of the test images, two of each class are those of another."""
    random = numpy.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            path = folder / split / name
            path.mkdir(parents=True)
            for number in range(PER_CLASS):
                shown = (label + 1) % len(CLASSES) if split == "val" and number < 2 else label
                pixels = random.normal(COLOURS[shown], 20, (32, 32, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(path / f"{number}.png")


def test_accuracy_of_a_tuned_model(tmp_path):
    """Its functions one by one: `clip_benchmark eval` itself ends in an error with NumPy 2.4."""
    pytest.importorskip("clip_benchmark", reason="pip install 'skipkernels[test-integrations]'")
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
    from clip_benchmark.models import load_clip

    photos, out, name = tmp_path / "photos", tmp_path / "run", "imagenet1k-unverified"
    coloured(photos)
    data, rates = f"imagefolder:{photos}", {"batch_size": 4, "text_lr": 1e-3, "image_lr": 1e-3}
    tune(
        TuneConfig(data=data, method="skip", shots="all", epochs=3, protocol="few-shot", device="cpu", out=out, **rates)
    )
    (expected,) = evaluate_run(out).values()

    files = {"classname": CLASSES, "template": ["a photo of a {c}."]}
    for kind, texts in files.items():
        (tmp_path / kind).write_text(json.dumps({name: texts}))
    custom = {f"custom_{kind}_file": str(tmp_path / kind) for kind in files}
    pictogram_tiny.register()
    model, transform, tokenizer = load_clip("open_clip", "pictogram-tiny", str(out / "model.safetensors"), None, "cpu")
    data = build_dataset(name, str(photos), transform, **custom)
    classifier = zero_shot_classifier(model, tokenizer, data.classes, data.templates, "cpu", amp=False)
    logits, labels = run_classification(model.eval(), classifier, DataLoader(data, 8), "cpu", amp=False)
    found = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
    assert found == pytest.approx(expected, abs=1e-3), "metrics have four digits"
    assert 100 / len(CLASSES) < expected < 100
