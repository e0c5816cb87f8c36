"""Runs with a feature cache on disk."""

from __future__ import annotations

import contextlib
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from skipkernels.app.train import evaluate_run, tune
from skipkernels.app.train.model import load_model
from skipkernels.app.train.setup import augmentation
from skipkernels.features import extraction
from tests.app.runs import fails, losses, rows, small, without_cost


@contextlib.contextmanager
def counted_images():
    """Number of images in each call of the encoder of a cache."""
    calls, encode = [], extraction.Encoder.__call__

    def counted(encoder, images):
        calls.append(len(images))
        return encode(encoder, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction.Encoder, "__call__", counted)
        yield calls


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Folder and metrics of a run with a cache."""
    folder = tmp_path_factory.mktemp("cached")
    with counted_images() as calls:
        metrics = tune(small(folder / "run", cache=folder / "cache", cache_dtype="fp32"))
    assert sorted(calls) == [1, 1, 1, 12, 12, 24], "an image of each set for the layout of features, then each set once"
    return folder, metrics


@pytest.fixture
def encoded():
    with counted_images() as calls:
        yield calls


def test_cache_gives_same_numbers(run, cached):
    (in_memory, expected), (folder, metrics) = run, cached
    assert without_cost(metrics) == without_cost(expected)
    assert losses(folder / "run") == losses(in_memory)
    assert {"train", "test-base", "test-new"} <= {path.name for path in (folder / "cache").iterdir()}
    first, second = (load_file(path / "model.safetensors") for path in (in_memory, folder / "run"))
    assert all(first[name].equal(second[name]) for name in first)


def test_cache_second_run_encodes_no_image(cached, tmp_path, encoded):
    folder, metrics = cached
    again = tune(small(tmp_path / "again", cache=folder / "cache", cache_dtype="fp32"))
    assert encoded == [1, 1, 1], "an image of each set, for the layout of features"
    assert without_cost(again) == without_cost(metrics) and losses(tmp_path / "again") == losses(folder / "run")


def test_evaluate_run_writes_nothing_and_needs_no_cache(cached, tmp_path, encoded):
    """This holds even if the configuration names a folder for the cache."""
    folder, metrics = cached
    shutil.copytree(folder / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"cache: {folder / 'cache'}" in config
    config = config.replace(f"cache: {folder / 'cache'}", f"cache: {tmp_path / 'elsewhere'}")
    config = config.replace("workers: 0", "workers: 64")
    (tmp_path / "run" / "config.yaml").write_text(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert evaluate_run(tmp_path / "run") == metrics["tuned"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before and not encoded


def test_cache_dtype_keeps_accuracy(run, tmp_path):
    expected = rows(run[0])[0]["accuracy"]
    metrics = tune(small(tmp_path / "run", cache=tmp_path / "cache", cache_dtype="int8", epochs=1))
    assert metrics["tuned"] == expected, "no image of 12 in each test has another class"
    assert evaluate_run(tmp_path / "run") == metrics["tuned"], "of features that are not rounded"


def test_cache_crops_training_images_only(run, cached, tmp_path):
    _, plain = run
    changes = {"cache_dtype": "fp32", "epochs": 1, "refresh": "epoch"}
    metrics = tune(small(tmp_path / "run", cache=tmp_path / "cache", **changes))
    assert metrics["status"] == "complete" and metrics["zero_shot"] == plain["zero_shot"]
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert {"test-base", "test-new"} <= kept and "train" not in kept, "the features of an epoch are read once"
    assert losses(tmp_path / "run")[0] != losses(cached[0] / "run")[0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("skipkernels")]


def test_cache_refuses_mismatch(cached, tmp_path, capsys):
    """tests/features/test_features_refusals.py has the other differences."""
    folder, _ = cached
    arguments = ["tune", "--shots", 2, "--max-classes", 24, "--epochs", 1, "--cache", folder / "cache"]
    said = fails([*arguments, "--cache-dtype", "bf16", "--out", tmp_path / "run"], capsys)
    assert "differs in dtype (fp32 there, bf16 here)" in said and str(folder / "cache") in said
    assert not (tmp_path / "run").exists()


def test_augmentation_reference_crops_and_flips():
    model, _, _ = load_model("pictogram-tiny", None, torch.device("cpu"))
    assert "scale=(0.9, 1.0)" in str(augmentation(model))
    published = str(augmentation(model, "reference"))
    assert "scale=(0.08, 1.0)" in published and "RandomHorizontalFlip(p=0.5)" in published
    assert "bicubic" in published
