"""`app.train.memory`: predicted sizes against those of real steps on the CPU, and against committed counts."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

import skipkernels as sk
from bench import counts
from bench.training import full_step
from skipkernels import testing
from skipkernels.app.cli.main import main
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.train.memory import MemoryModel

MODEL, B, C = "pictogram-tiny", 8, 60
# Attention on the CPU saves the log-sum-exp of other paddings, and host constants are saved as tensors.
SAVED, FEW = 0.02, 30_000
# Casts and temporaries within operators of the CPU: of a small model they are a larger share than of a large one.
PEAK = 0.1


@pytest.fixture(scope="module")
def task():
    """A model, its prompts with four tokens in each name, features and labels."""
    model, _, tokenizer = pictogram_tiny.load()
    words = "cat dog bird fish car bus red blue".split()
    names = [" ".join(reversed(name)) for name in itertools.islice(itertools.product(words, repeat=4), C)]
    return model, tokenizer([f"a photo of a {name}." for name in names])


@pytest.mark.parametrize(("precision", "memory"), [("fp32", "fast"), ("fp32", "min"), ("bf16", "fast")])
def test_a_real_step(task, precision, memory):
    clip = sk.SkipCLIP(*task, skip_layers=0.5, memory=memory)
    features, labels = clip.encode_lower(torch.randn(B, 3, 32, 32)), torch.arange(B)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return clip(features, labels).loss

    predicting = MemoryModel(MODEL, precision=precision)
    found = predicting.predict(B, C, memory, images=10)
    assert predicting.kept(C, B) == clip.sampler.expected_keep(C, B)
    assert found.saved_images + found.saved_texts == pytest.approx(testing.saved_bytes(loss), rel=SAVED, abs=FEW)
    clip.model.zero_grad()
    assert found.step == pytest.approx(testing.allocated_bytes(lambda: loss().backward()), rel=PEAK)
    assert found.gradients == found.momentum == sum(p.nbytes for p in clip.trainable_parameters())
    assert found.weights == sum(tensor.nbytes for tensor in (*clip.model.parameters(), *clip.model.buffers()))
    assert found.image_features == 10 * predicting.feature_bytes() == 10 * features[0].nbytes
    rows, prompts = clip._text_encoder.templates[0].rows, clip._text.prompts
    kept = (rows, clip.prototypes, *prompts.tensors().values())
    assert found.text_features == sum(tensor.nbytes for tensor in kept)
    held = found.weights + found.momentum + found.text_features + found.image_features
    assert found.total == held + found.step + found.evaluation


def test_a_real_step_of_full_fine_tuning(task):
    model, tokens = pictogram_tiny.load()[0], task[1]
    model.requires_grad_(True).logit_scale.requires_grad_(False)
    step, images = full_step(model, tokens), torch.randn(B, 3, 32, 32)
    found = MemoryModel(MODEL, method="full", precision="fp32").predict(B, C, "fast")
    # Attention of a GPU saves its output in another layout, one width per token and block more.
    saved = testing.saved_bytes(lambda: step(images, torch.arange(B)))
    assert saved <= found.saved_images + found.saved_texts <= 1.15 * saved


def test_committed_counts():
    """Names of ImageNet have 2.2 tokens on average."""
    case = ("ViT-B-16", 4, 1000), "bf16", counts.SGD
    rows = [row for row in counts.read_table() if (row.key[1:4], row.precision, row.optimizer) == case]
    model = MemoryModel("ViT-B-16", skip_layers=6, precision="bf16", name_tokens=2)
    assert [row.memory for row in rows] == ["fast", "min"]
    for row in rows:
        found = model.predict(4, 1000, row.memory)
        assert found.gradients == row.gradient_bytes
        assert found.saved_images + found.saved_texts == pytest.approx(row.saved_bytes, rel=0.03)


def test_numbers_of_the_recipes():
    """Those of ViT-B/16; the others take longer."""
    page = Path(__file__).parents[3] / "docs" / "recipes.md"
    row = r"ViT-B-16-quickgelu \| ([\d,]+) \(([\d,]+)\) \| (\d+) \| ([\d.]+); ([\d.]+) "
    rows = re.findall(row, page.read_text(encoding="utf-8"))
    assert len(rows) == 2
    for classes, kept, batch, fast, least in rows:
        C, B = int(classes.replace(",", "")), int(batch)
        model = MemoryModel("ViT-B-16-quickgelu", name_tokens=12 if C == 20_000 else 4)
        assert model.kept(C, B) == int(kept.replace(",", ""))
        for memory, size in (("fast", fast), ("min", least)):
            assert model.predict(B, C, memory).total / 2**30 == pytest.approx(float(size), abs=0.06)


@pytest.mark.parametrize("options", [{"train_text": False}, {"skip_layers": 0}, {"precision": "bf16-sr"}], ids=str)
def test_other_settings_of_a_run(options):
    usual, found = (MemoryModel(MODEL, **given).predict(B, C, "fast") for given in ({}, options))
    if "train_text" in options:
        assert found.momentum < usual.momentum and found.text_features < usual.text_features
    elif "skip_layers" in options:
        assert found.momentum > usual.momentum and found.saved_images > usual.saved_images
    else:
        assert found.weights == pytest.approx(usual.weights / 2, rel=0.01)
        assert found.momentum == pytest.approx(usual.momentum / 2, rel=0.01)


def test_command(capsys):
    arguments = ["memory", MODEL, "--classes", "500", "--batch", "16", "--fit", "2GB", "--images-in-memory", "1000"]
    assert main([*arguments, "--memory", "min", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept_classes"] == 77 and found["memory"].keys() == {"min"}
    sizes = found["memory"]["min"]
    model = MemoryModel(MODEL)
    for name, value in (("classes", sizes["largest_classes"]), ("batch_size", sizes["largest_batch_size"])):
        totals = (
            model.predict(**{"classes": 500, "batch_size": 16} | {name: count}, memory="min", images=1000).total
            for count in (value, value + value // 50 + 1)
        )
        fits, over = (total <= 2**30 for total in totals)  # of 2 GB, 1 is assumed for CUDA
        assert fits and not over
    assert main(arguments[:-4]) == 0
    out, err = capsys.readouterr()
    assert (
        "--memory fast" in out
        and "--memory min" in out
        and "8 GB" in out
        and "MiB: in memory with --images-in-memory" in err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ViT-B-61", "--model: open_clip has no model 'ViT-B-61'; did you mean"),
        (f"{MODEL} --classes 0", "--classes must be from 1 to 10,000,000; got 0."),
        (f"{MODEL} --skip-layers 7", "--skip-layers must be a whole number from 0 to"),
        (f"{MODEL} --name-tokens 80", "--name-tokens: must leave room for the prompt in the"),
        (f"{MODEL} --fit lots", "--fit must be a number of GB, such as 8GB; got 'lots'."),
    ],
)
def test_command_reports_bad_input(arguments, message, capsys):
    assert main(["memory", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
