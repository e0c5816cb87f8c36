"""No thread and no SkipCLIP stays behind after a public call, even if its result is not used up."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image

import skipkernels as sk
from skipkernels.app.train import tune
from tests.app.runs import small
from tests.models import tiny_batch, tiny_clip, tiny_tokens

C = 7


def _construct_with_text_cache(folder):
    for _ in range(2):  # written, then opened
        sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1, text_cache=folder / "texts", chunk=2)


def _train_and_predict(folder):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1)
    images, labels = tiny_batch(3, C, torch.float32)
    clip(images, labels).loss.backward()
    clip.predict(images)
    clip.top_k(images, 2)


def _break_off_a_loader(folder):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1)
    images, labels = tiny_batch(8, C, torch.float32)
    cache = sk.FeatureCache.build(
        folder / "features", clip, [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    )
    for features, of_batch in cache.loader(batch_size=2, sampler="class_pure", prefetch=2):
        clip(features, of_batch)
        break


def _tune_and_break_off_predictions(folder):
    tune(small(folder / "run", epochs=1, cache=folder / "cache"))
    for number in range(20):
        Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
    next(sk.Classifier.load(folder / "run").predict_batches(folder, batch_size=2))


@pytest.mark.parametrize(
    "call", [_construct_with_text_cache, _train_and_predict, _break_off_a_loader, _tune_and_break_off_predictions]
)
def test_public_call_leaves_nothing_behind(call, tmp_path):
    def alive() -> tuple[set[threading.Thread], int]:
        gc.collect()
        return set(threading.enumerate()), sum(isinstance(x, sk.SkipCLIP) for x in gc.get_objects())

    threads, clips = alive()
    call(tmp_path)
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)  # a pool is not waited for
    left, clips_left = alive()
    assert left <= threads and clips_left == clips


def test_iterators_that_are_held_at_exit_end_in_silence():
    code = """
import torch, skipkernels as sk
from skipkernels.app.data.images import read_ahead
features = sk.FeatureCache.in_memory([(torch.zeros(3, 2, 2), 0)] * 9)
batches = iter(features.loader(2, "random", prefetch=2))
numbers = read_ahead(abs, 9, workers=1, ahead=4)
print(len(next(batches)), next(numbers))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2 0\n", "")
