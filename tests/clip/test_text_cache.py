"""Text features in a folder: equal to those in memory, computed once, refused for other weights or prompts."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from open_clip.transformer import QuickGELU

import skipkernels as sk
from skipkernels.features.writer import TableWriter
from skipkernels.folders import locked
from skipkernels.towers.text import TextTower
from tests.clip.clips import three_templates
from tests.models import tiny_batch, tiny_clip, tiny_coca, tiny_tokens

CLASSES = 9


def make_clip(folder=None, *, model=None, tokens=None, chunk=4, **options):
    model = tiny_clip(torch.float32) if model is None else model
    tokens = tiny_tokens(CLASSES) if tokens is None else tokens
    return sk.SkipCLIP(model, tokens, **({"skip_layers": 1} | options), chunk=chunk, text_cache=folder)


def step(clip):
    """Loss, classes and gradients of a step, prototypes and class embeddings."""
    images, labels = tiny_batch(3, CLASSES, torch.float32)
    out = clip(images, labels)
    out.loss.backward()
    gradients = [p.grad for p in clip.trainable_parameters()]
    return [out.loss, out.class_ids, *gradients, clip.prototypes, clip.class_embeddings()]


def same(ours, theirs):
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def other_starts():
    """Prompts that begin with different tokens and so share no prefix."""
    tokens = tiny_tokens(CLASSES)
    tokens[:, 0] = torch.arange(CLASSES) + 1
    return tokens


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "tokens", [tiny_tokens(CLASSES), other_starts(), three_templates(CLASSES)], ids=["prefix", "alone", "templates"]
)
@pytest.mark.parametrize("skip", [1, 3])
def test_text_cache_equals_memory(tmp_path, monkeypatch, skip, tokens, padded):
    if padded:
        monkeypatch.setattr("skipkernels.towers.prompts.counts_are_known", lambda device: False)
    theirs = step(make_clip(tokens=tokens, skip_layers=skip))
    for _ in ("created", "opened"):
        assert same(step(make_clip(tmp_path, tokens=tokens, skip_layers=skip)), theirs)


def test_text_cache_with_class_token_behind_padding(tmp_path):
    """A prompt with padding in its middle: CoCa's class token then adds a row to every prompt."""
    tokens = tiny_tokens(CLASSES, context=76)
    tokens[2, 2] = 0
    theirs = step(make_clip(model=tiny_coca().float(), tokens=tokens))
    assert same(step(make_clip(tmp_path, model=tiny_coca().float(), tokens=tokens)), theirs)


def texts_that_run(monkeypatch) -> list[int]:
    """Numbers of texts that run below the cut, call by call."""
    ran, lower = [], TextTower.lower

    def counted(tower, selected):
        ran.append(len(selected.class_ids))
        return lower(tower, selected)

    monkeypatch.setattr(TextTower, "lower", counted)
    return ran


def test_text_cache_opened_runs_one_text_below_cut(tmp_path, monkeypatch):
    ran = texts_that_run(monkeypatch)
    make_clip(tmp_path)
    assert sum(ran) == CLASSES + 1
    ran.clear()
    step(make_clip(tmp_path))
    assert ran == [1], "one text, for the width of a row"


def test_text_cache_interrupted_build_resumes(tmp_path, monkeypatch):
    theirs, write = step(make_clip()), TableWriter.write

    def interrupted(self, first, rows):
        if first > 0:
            raise KeyboardInterrupt
        write(self, first, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TableWriter, "write", interrupted)
        make_clip(tmp_path)
    ran = texts_that_run(monkeypatch)
    assert same(step(make_clip(tmp_path)), theirs)
    assert ran == [1, 4, 1], "of nine classes in chunks of four, those of the first chunk were written"


# ---- features that do not match --------------------------------------------------------------------------------------


def test_text_cache_of_other_prompts_or_weights_raises(tmp_path):
    make_clip(tmp_path)
    another_activation = tiny_clip(torch.float32)
    for block in another_activation.transformer.resblocks:
        block.mlp.gelu = QuickGELU()
    said = rf"^{tmp_path}/features: .* differs in prompts\. Choose another folder, or delete this one\."
    with pytest.raises(sk.CacheError, match=said):
        make_clip(tmp_path, tokens=tiny_tokens(CLASSES, seed=1))
    with pytest.raises(sk.CacheError, match=r"differs in (embedding|lower blocks)"):
        make_clip(tmp_path, model=tiny_clip(torch.float32, seed=1))
    with pytest.raises(sk.CacheError, match=r"differs in skipped blocks \(1 there, 2 here\)"):
        make_clip(tmp_path, skip_layers=2)
    with pytest.raises(sk.CacheError, match="features: this model computes other features from the same weights"):
        make_clip(tmp_path, model=another_activation)


def test_text_cache_late_lower_hook(tmp_path):
    """It is an error if it changes the features."""
    clip = make_clip(tmp_path)
    expected = step(clip)[0]
    note = clip.model.token_embedding.register_forward_hook(lambda module, args, out: None)
    step(clip)
    note.remove()
    handle = clip.model.token_embedding.register_forward_hook(lambda module, args, out: 1.3 * out)
    with pytest.raises(sk.CacheError, match="computes other features from the same weights"):
        step(clip)
    handle.remove()
    assert step(clip)[0].shape == expected.shape


# ---- other uses of the folder ----------------------------------------------------------------------------------------


def test_text_cache_waits_for_another_process(tmp_path, capfd):
    (tmp_path / "features").mkdir()
    made: list[sk.SkipCLIP] = []
    thread = threading.Thread(target=lambda: made.append(make_clip(tmp_path)), daemon=True)
    with locked(tmp_path / "features"):
        thread.start()
        while "Waiting for it" not in capfd.readouterr().err:
            assert thread.is_alive()
            time.sleep(0.01)
    thread.join(60)
    assert same(step(made[0]), step(make_clip()))


def test_set_classes_of_a_text_cache_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="set_classes cannot replace the classes of a text_cache"):
        make_clip(tmp_path).set_classes(tiny_tokens(5))
