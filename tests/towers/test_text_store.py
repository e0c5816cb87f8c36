"""Texts kept in a folder: the same numbers as in memory, made once, and never those of other weights or prompts."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch
from open_clip.transformer import QuickGELU

import skipkernels as sk
from skipkernels.clip.text_encoder import TextEncoder
from skipkernels.store import Writer, writer
from skipkernels.store.lock import locked
from skipkernels.towers import text_store
from skipkernels.towers.prompts import SharedPrefix
from tests.models import tiny_batch, tiny_clip, tiny_tokens

CLASSES = 9


def made(folder=None, *, model=None, tokens=None, chunk=4, **options):
    model = tiny_clip(torch.float32) if model is None else model
    tokens = tiny_tokens(CLASSES) if tokens is None else tokens
    return sk.SkipCLIP(model, tokens, **({"skip_layers": 1} | options), chunk=chunk, text_cache=folder)


def step(clip):
    """Loss, classes and gradients of a step, and the embeddings of all classes."""
    images, labels = tiny_batch(3, CLASSES, torch.float32)
    out = clip(images, labels)
    out.loss.backward()
    gradients = [p.grad for p in clip.trainable_parameters()]
    return [out.loss, out.class_ids, *gradients, clip.prototypes, clip.class_embeddings()]


def same(ours, theirs):
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def other_starts():
    """Prompts that begin with different tokens, so that each stands by itself."""
    tokens = tiny_tokens(CLASSES)
    tokens[:, 0] = torch.arange(CLASSES) + 1
    return tokens


@pytest.mark.parametrize("shard_bytes", [200, 1 << 20], ids=["small-shards", "one-shard"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("tokens", [tiny_tokens(CLASSES), other_starts()], ids=["prefix", "alone"])
@pytest.mark.parametrize("skip", [1, 3])
def test_every_number_is_that_from_memory(tmp_path, monkeypatch, skip, tokens, padded, shard_bytes):
    monkeypatch.setattr(text_store, "_SHARD_BYTES", shard_bytes)
    if padded:
        monkeypatch.setattr(SharedPrefix, "_packs", lambda self, device: False)
    theirs = step(made(tokens=tokens, skip_layers=skip))
    for _ in ("made", "opened"):
        assert same(step(made(tmp_path, tokens=tokens, skip_layers=skip)), theirs)


def test_from_a_folder_no_text_runs_below_the_cut_but_one(tmp_path, monkeypatch):
    ran = []
    lower = TextEncoder.lower
    monkeypatch.setattr(TextEncoder, "lower", lambda self, ids: ran.append(len(ids)) or lower(self, ids))
    made(tmp_path)
    assert sum(ran) == CLASSES + 1
    ran.clear()
    step(made(tmp_path))
    assert ran == [1], "which tells the width of a row"


def test_a_build_that_was_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(text_store, "_SHARD_BYTES", 200)
    theirs, write = step(made()), Writer.write

    def killed(self, number, tensors):
        if number == 5:
            raise KeyboardInterrupt
        write(self, number, tensors)

    monkeypatch.setattr(Writer, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path)
    again: list[int] = []
    monkeypatch.setattr(Writer, "write", lambda self, n, t: again.append(n) or write(self, n, t))
    clip = made(tmp_path)
    assert min(again[:1]) == 5 and same(step(clip), theirs)


def test_a_damaged_shard_in_the_middle_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(text_store, "_SHARD_BYTES", 200)
    theirs = step(made(tmp_path))
    shards = sorted((tmp_path / "features").glob("*.safetensors"))
    shards[len(shards) // 2].write_bytes(b"no shard")
    with pytest.warns(UserWarning, match=rf"{shards[len(shards) // 2].name}: damaged"):
        clip = made(tmp_path)
    assert same(step(clip), theirs)


def test_other_prompts_are_refused(tmp_path):
    made(tmp_path)
    with pytest.raises(sk.StoreError, match=r"differs in prompts"):
        made(tmp_path, tokens=tiny_tokens(CLASSES, seed=1))


def test_other_weights_below_the_cut_are_refused(tmp_path):
    made(tmp_path)
    with pytest.raises(sk.StoreError, match=r"differs in (embedding|lower blocks)"):
        made(tmp_path, model=tiny_clip(torch.float32, seed=1))
    with pytest.raises(sk.StoreError, match=r"differs in skipped blocks \(1 there, 2 here\)"):
        made(tmp_path, skip_layers=2)


def test_weights_below_the_cut_that_change_later_are_an_error(tmp_path):
    clip = made(tmp_path)
    with torch.no_grad():
        clip.model.transformer.resblocks[0].ln_1.weight.mul_(1.1)
    with pytest.raises(sk.StoreError, match=r"below the cut of the text tower have changed .* another text_cache"):
        step(clip)


def test_a_hook_below_the_cut_is_not_in_the_features_of_a_folder(tmp_path):
    clip = made(tmp_path)
    step(clip)
    clip.model.ln_final.register_forward_hook(lambda module, args, out: out)  # above the cut: called as ever
    step(clip)
    note = clip.model.token_embedding.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(RuntimeError, match="which the features of text_cache are without"):
        step(clip)
    clip.refresh()
    step(clip)
    note.remove()
    clip.model.token_embedding.register_forward_hook(lambda module, args, out: 1.3 * out)
    with pytest.raises(RuntimeError, match="embeds texts differently"):
        clip.refresh()


def test_prototypes_are_those_of_the_weights_above_the_cut(tmp_path):
    made(tmp_path)
    tuned = tiny_clip(torch.float32)
    with torch.no_grad():
        tuned.text_projection.mul_(torch.linspace(0.5, 2.0, tuned.text_projection.shape[1]))
    theirs = step(made(model=tuned))
    tuned.zero_grad()
    assert same(step(made(tmp_path, model=tuned)), theirs)


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text_cache keeps features at the cut"):
        made(tmp_path, skip_layers=0)
    with pytest.raises(sk.StoreError, match=r"text_cache keeps fp32, fp16, bf16; .*float64"):
        made(tmp_path, model=tiny_clip(torch.float64))


# ---- what is there and does not fit ------------------------------------------------------------------------------


def with_another_activation(blocks, dtype=torch.float32):
    """The same weights."""
    model = tiny_clip(dtype)
    for block in model.transformer.resblocks[blocks]:
        block.mlp.gelu = QuickGELU()
    return model


def test_a_bit_of_the_prototypes_that_was_flipped_is_found_and_mended(tmp_path):
    theirs = step(made(tmp_path))
    shard = tmp_path / "prototypes" / "00000.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-100] + bytes([sound[-100] ^ 1]) + sound[-99:])
    with pytest.warns(UserWarning, match=r"prototypes/00000.safetensors: damaged: .* It is made again"):
        clip = made(tmp_path)
    assert same(step(clip), theirs) and shard.read_bytes() == sound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_another_activation_above_the_cut_has_other_prototypes(tmp_path, dtype):
    first = made(tmp_path, model=tiny_clip(dtype)).prototypes
    theirs = made(model=with_another_activation(slice(1, None), dtype)).prototypes
    assert not theirs.equal(first)
    for _ in ("made", "opened"):
        assert made(tmp_path, model=with_another_activation(slice(1, None), dtype)).prototypes.equal(theirs)


def test_another_activation_below_the_cut_is_refused_by_name_of_the_folder(tmp_path):
    made(tmp_path)
    said = rf"features: holds a text_cache of another model: .* Give another text_cache .*, or delete {tmp_path};"
    with pytest.raises(sk.StoreError, match=said):
        made(tmp_path, model=with_another_activation(slice(None)))


def test_what_is_refused_has_a_remedy(tmp_path):
    made(tmp_path)
    said = (
        rf"differs in prompts \(.*\)\. Give another text_cache \(--cache\), or delete {tmp_path}; .* build --overwrite"
    )
    with pytest.raises(sk.StoreError, match=said):
        made(tmp_path, tokens=tiny_tokens(CLASSES, seed=1))


def test_what_is_complete_is_opened_without_a_lock(tmp_path, monkeypatch):
    """Its disk may be read-only, and others may open it at the same time."""
    theirs = step(made(tmp_path))
    monkeypatch.setattr(writer, "locked", lambda *arguments, **options: pytest.fail("a lock was taken"))
    assert same(step(made(tmp_path)), theirs)


def test_who_finds_another_at_work_waits_and_takes_what_it_made(tmp_path, capfd):
    theirs, ours, errors = step(made(tmp_path / "alone")), [], []

    def second():
        try:
            ours.append(made(tmp_path / "shared"))
        except BaseException as error:
            errors.append(error)

    (tmp_path / "shared" / "features").mkdir(parents=True)
    thread = threading.Thread(target=second, daemon=True)
    with locked(tmp_path / "shared" / "features"):
        thread.start()
        while "Waiting for it" not in capfd.readouterr().err:
            assert thread.is_alive(), errors
            time.sleep(0.01)
        for file in (tmp_path / "alone" / "features").glob("[!.]*"):
            shutil.copy(file, tmp_path / "shared" / "features")
    thread.join(60)
    assert not errors and same(step(ours[0]), theirs)
