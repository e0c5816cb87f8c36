"""A whole run: what it writes, that it repeats, that it survives Ctrl-C, and what it says of bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import threading

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import skipkernels.tuning.loop as loop
from skipkernels.cache import build
from skipkernels.cli import main
from skipkernels.data import InputError
from skipkernels.optimizer import FusedSGD
from skipkernels.tuning import Accuracy, TuneConfig, evaluate_run, tune
from skipkernels.tuning.config import PUBLISHED
from skipkernels.tuning.model import load_model

SMALL = TuneConfig(shots=4, classes=12, epochs=2, device="cpu")
FILES = {"config.yaml", "metrics.json", "metrics.jsonl", "model.safetensors", "report.html"}


def small(out, **changes) -> TuneConfig:
    return dataclasses.replace(SMALL, out=out, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, tune(small(folder))


def test_files_and_metrics(run):
    folder, metrics = run
    assert {file.name for file in folder.iterdir()} == FILES
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["accuracy"] == metrics["tuned"]
    assert metrics["status"] == "complete" and metrics["steps"] == 12
    assert metrics["kept_classes"] == 5  # four labels fit, and one of two in the tail
    assert metrics["cost"]["peak_memory_mib"] > metrics["cost"]["baseline_memory_mib"] * 0.5 > 50
    html = (folder / "report.html").read_text()
    assert "<svg" in html and not re.search(r"""(src|href)=["']?(https?:|//)""", html), "the report stands alone"


def test_skip_tuning_beats_zero_shot_on_characters_never_seen(tmp_path):
    metrics = tune(TuneConfig(shots=8, epochs=4, device="cpu", out=tmp_path))
    zero_shot, tuned = metrics["zero_shot"], metrics["tuned"]
    assert zero_shot["base"] > 20, "ten times chance over 50 classes"
    assert tuned["base"] > zero_shot["base"] + 15
    assert tuned["new"] > zero_shot["new"] - 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2


def test_eval_gives_the_reported_accuracy_to_the_digit(run, capsys):
    folder, metrics = run
    assert evaluate_run(folder).as_dict() == metrics["tuned"]
    assert main(["eval", "--checkpoint", str(folder / "model.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == metrics["tuned"]


def test_open_clip_loads_the_checkpoint_and_agrees(run):
    folder, metrics = run
    model, _, preprocess = open_clip.create_model_and_transforms("glyph-tiny")
    open_clip.load_checkpoint(model, str(folder / "model.safetensors"))
    task = loop.load_task(small(folder), preprocess)
    images, labels = zip(*task.base.test, strict=True)
    tokens = open_clip.get_tokenizer("glyph-tiny")(task.base.prompts)
    with torch.no_grad():
        answers = model.eval().get_logits(torch.stack(images), tokens)[0].argmax(dim=1)
    assert 100 * (answers == torch.tensor(labels)).double().mean().item() == pytest.approx(
        metrics["tuned"]["base"], abs=1e-4
    )


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    _, metrics = run
    again = tune(small(tmp_path))
    assert {k: v for k, v in again.items() if k != "cost"} == {k: v for k, v in metrics.items() if k != "cost"}
    other = tune(small(tmp_path / "other", seed=1))
    assert other["tuned"] != metrics["tuned"] or other["zero_shot"] != metrics["zero_shot"]


def test_the_fused_optimizer_gives_the_same_numbers(run, tmp_path, monkeypatch):
    folder, metrics = run
    made = []
    monkeypatch.setattr(loop, "FusedSGD", lambda *args, **kwargs: made.append(args) or FusedSGD(*args, **kwargs))
    fused = tune(small(tmp_path, fused_optimizer=True))
    assert len(made) == 1
    assert {k: v for k, v in fused.items() if k != "cost"} == {k: v for k, v in metrics.items() if k != "cost"}
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (folder, tmp_path)]
    expected, losses = ([json.loads(line)["loss"] for line in epochs] for epochs in lines)
    assert losses == pytest.approx(expected, rel=1e-5), "the two round in other places"


def test_below_the_cut_nothing_moves_and_above_it_does(run):
    folder, _ = run
    before = load_model("glyph-tiny", None, torch.device("cpu"))[0].state_dict()
    after = load_file(folder / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert not any(
        name.startswith(("visual.conv1", "token_embedding", "visual.transformer.resblocks.2")) for name in moved
    )
    assert "visual.transformer.resblocks.3.mlp.c_fc.weight" in moved and "text_projection" in moved
    assert "logit_scale" not in moved


def test_full_fine_tuning_moves_everything_and_is_compared_over_all_classes(tmp_path):
    metrics = tune(small(tmp_path, method="full", epochs=1))
    assert metrics["kept_classes"] == 6
    assert evaluate_run(tmp_path).as_dict() == metrics["tuned"]
    before, after = (
        load_model("glyph-tiny", None, torch.device("cpu"))[0].state_dict(),
        load_file(tmp_path / "model.safetensors"),
    )
    assert {name for name in before if before[name].equal(after[name])} <= {"logit_scale"}


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"skip_layers": 0}, {"skip_layers": 1.0}, {"tail": "fixed"}, {"memory": "min"},
     {"sampler": "random", "batch_size": 5}, {"classes": 2}, {"classes": 3}],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)  # fmt: skip
def test_options(tmp_path, changes):
    metrics = tune(small(tmp_path, epochs=1, **changes))
    assert metrics["status"] == "complete"
    assert evaluate_run(tmp_path).as_dict() == metrics["tuned"]


# ---- features on the disk ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A run whose features are kept, and where."""
    folder = tmp_path_factory.mktemp("cached")
    return folder, tune(small(folder / "run", cache=folder / "cache", cache_dtype="fp32"))


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_cost(metrics) -> dict:
    return {name: value for name, value in metrics.items() if name != "cost"}


@pytest.fixture
def encoded(monkeypatch):
    """How many images at once were encoded for a store, call by call."""
    calls, encode = [], build.Encoder.__call__

    def counted(encoder, images):
        calls.append(len(images))
        return encode(encoder, images)

    monkeypatch.setattr(build.Encoder, "__call__", counted)
    return calls


def test_features_on_the_disk_give_the_same_numbers(run, cached):
    (in_memory, expected), (folder, metrics) = run, cached
    assert without_cost(metrics) == without_cost(expected)
    assert losses(folder / "run") == losses(in_memory)
    assert {"train", "test-base", "test-new"} <= {path.name for path in (folder / "cache").iterdir()}
    first, second = (load_file(path / "model.safetensors") for path in (in_memory, folder / "run"))
    assert all(first[name].equal(second[name]) for name in first)


def test_a_second_run_encodes_no_image_again(cached, tmp_path, encoded):
    folder, metrics = cached
    again = tune(small(tmp_path / "again", cache=folder / "cache", cache_dtype="fp32"))
    assert max(encoded) == 1, "the one image that tells how features lie"
    assert without_cost(again) == without_cost(metrics) and losses(tmp_path / "again") == losses(folder / "run")
    encoded.clear()
    tune(small(tmp_path / "another", cache=tmp_path / "cache", cache_dtype="fp32", epochs=1))
    assert sum(encoded) >= 12 // 2 * 4 + 12 * 12, "all training and test images"


def test_eval_of_a_run_with_a_cache(cached, encoded):
    folder, metrics = cached
    assert evaluate_run(folder / "run").as_dict() == metrics["tuned"]
    assert max(encoded) == 1


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_features_that_are_kept_in_fewer_bits_are_as_good(run, tmp_path, dtype):
    _, expected = run
    metrics = tune(small(tmp_path / "run", cache=tmp_path / "cache", cache_dtype=dtype))
    # 72 images of each kind: one of them is 1.4 %.
    assert metrics["tuned"]["base"] == pytest.approx(expected["tuned"]["base"], abs=6)
    assert metrics["tuned"]["new"] == pytest.approx(expected["tuned"]["new"], abs=6)


@pytest.mark.parametrize("changes", [{"views": 2}, {"refresh": "epoch"}], ids=["views", "refresh"])
def test_crops_are_drawn_for_training_images_alone(run, cached, tmp_path, changes):
    _, plain = run
    metrics = tune(small(tmp_path / "run", cache=tmp_path / "cache", cache_dtype="fp32", **changes))
    assert metrics["status"] == "complete" and metrics["zero_shot"] == plain["zero_shot"]
    assert losses(tmp_path / "run") != losses(cached[0] / "run")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("skipkernels")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--pretrained", "random"], "another|differs in"),
        (["--skip-layers", "2"], "another|differs in"),
        (["--cache-dtype", "bf16"], r"differs in dtype \(fp32 there, bf16 here\)"),
        (["--shots", "3"], "differs in"),
    ],
    ids=["weights", "cut", "dtype", "images"],
)
def test_a_cache_of_something_else_is_refused(cached, tmp_path, capsys, changes, message):
    folder, _ = cached
    arguments = ["tune", "--shots", 4, "--classes", 12, "--epochs", 1, "--cache", folder / "cache"]
    arguments += ["--cache-dtype", "fp32", "--out", tmp_path / "run", *changes]
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # below the bar of what was done before
    assert error.startswith("error") and re.search(message, error) and str(folder / "cache") in error
    assert not (tmp_path / "run").exists()


def test_a_cache_that_is_damaged_is_mended(cached, tmp_path):
    folder, metrics = cached
    shutil.copytree(folder / "cache", tmp_path / "cache")
    shard = tmp_path / "cache" / "train" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="its contents have changed.* It is made again"):
        again = tune(small(tmp_path / "run", cache=tmp_path / "cache", cache_dtype="fp32"))
    assert without_cost(again) == without_cost(metrics)


def test_a_cache_survives_yaml(tmp_path):
    config = small(tmp_path, cache=tmp_path / "cache", cache_dtype="int8", views=2, workers=1).resolved()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    read = TuneConfig.from_yaml(tmp_path / "config.yaml")
    assert read == config and read.cache == tmp_path / "cache"


# ---- what ends a run before its time -----------------------------------------------------------------------------


def test_ctrl_c_leaves_the_last_complete_epoch(tmp_path, monkeypatch):
    calls = iter(range(1000))
    step = loop.skip_step

    def interrupted(clip):
        inner = step(clip)

        def run(*args):
            if next(calls) == 9:  # in the second epoch of six steps
                raise KeyboardInterrupt
            return inner(*args)

        return run

    monkeypatch.setattr(loop, "skip_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(small(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["status"], metrics["epochs"], metrics["steps"]) == ("interrupted", 1, 6)
    assert evaluate_run(tmp_path).as_dict() == metrics["tuned"]
    assert "interrupted after 1 epochs" in (tmp_path / "report.html").read_text()


def test_ctrl_c_before_the_first_epoch_says_so(tmp_path, monkeypatch):
    def interrupted(clip):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "skip_step", lambda clip: lambda *args: interrupted(clip))
    with pytest.raises(KeyboardInterrupt):
        tune(small(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"config.yaml", "metrics.json"}
    with pytest.raises(InputError, match="before its first epoch"):
        evaluate_run(tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--shots", "4", "--classes", "12", "--epochs", "3", "--warmup-epochs", "1", "--warmup-lr", "1e-4"]
    assert main(["tune", *arguments, "--text-lr", "1e18", "--image-lr", "1e18", "--out", str(out)]) == 1
    assert "the loss of epoch" in capsys.readouterr().err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["status"] == "diverged" and metrics["epochs"] == 1
    assert evaluate_run(out).as_dict() == metrics["tuned"]


def test_termination_leaves_what_ctrl_c_leaves(tmp_path, monkeypatch):
    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "skip_step", lambda clip: terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["tune", "--shots", "2", "--classes", "12", "--epochs", "1", "--out", str(tmp_path / "run")]) == 130
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_random_weights_are_those_of_the_seed():
    first, again, other = (
        load_model("glyph-tiny", "random", torch.device("cpu"), seed=seed)[0].positional_embedding for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_config_survives_yaml(tmp_path):
    config = small(tmp_path, skip_layers=2, text_lr=1e-3).resolved()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TuneConfig.from_yaml(tmp_path / "config.yaml") == config


def test_other_models_get_the_published_recipe():
    config = TuneConfig(model="ViT-B-16", pretrained="random").resolved()
    assert (config.epochs, config.text_lr, config.image_lr) == (PUBLISHED.epochs, PUBLISHED.text_lr, PUBLISHED.image_lr)


def test_schedule():
    config = TuneConfig(epochs=4, warmup_epochs=1, warmup_lr=1e-4).resolved()
    factors = [loop.epoch_factor(epoch, config, 2e-3) for epoch in range(4)]
    assert factors == pytest.approx([0.05, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5])


def test_harmonic_mean_of_nothing():
    assert Accuracy(0.0, 0.0).harmonic == 0.0


# ---- what is wrong with the input, each one line and exit code 2 ---------------------------------------------------


@pytest.fixture
def damaged(run, tmp_path):
    folder, _ = run
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def fails(arguments, capsys) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error") and "\n" not in error and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagenet"], "no dataset"),
        (["--data", "glyphs:emoticons"], "draw only 0"),
        (["--shots", "0"], "every base class needs a training image"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--model", "ViT-B-61"], "did you mean"),
        (["--model", "ViT-B-16"], "ViT-B-16 needs weights"),
        (["--model", "ViT-B-16", "--pretrained", "nonsense"], "no tag 'nonsense'"),
        (["--pretrained", "nowhere/model.safetensors"], "no file nowhere/model.safetensors"),
        (["--attention", "xformers"], 'attention="xformers" cannot serve here'),
        (["--skip-layers", "7"], "whole number from 0 to 6"),
        (["--keep-ratio", "0"], "keep_ratio must be above 0"),
        (["--decay", "-1"], "decay must be above 0"),
        (["--max-keep", "0"], "max_keep must be at least 1"),
        (["--device", "cuda:99"], "can't be used"),
        (["--method", "full", "--cache", "c"], "nothing below a cut is kept where every layer trains"),
        (["--skip-layers", "0", "--cache", "c"], "nothing below a cut is kept where every layer trains"),
        (["--views", "2"], "add --cache PATH"),
        (["--refresh", "epoch"], "add --cache PATH"),
        (["--views", "0"], "--views must be at least 1; got 0"),
        (["--workers", "-1"], "--workers must be at least 0; got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert message in fails(["tune", "--out", tmp_path / "run", *arguments], capsys)
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_unknown_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["tune", "--shotz", "3"])
    assert exit_.value.code == 2


def test_an_earlier_run_is_not_overwritten_unasked(run, capsys):
    folder, _ = run
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "holds an earlier run" in fails(["tune", "--out", folder, "--epochs", "1"], capsys)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(["tune", "--out", tmp_path / "file"], capsys)


def test_out_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "not a folder that can be written to" in fails(["tune", "--out", tmp_path / "file" / "run"], capsys)


def test_eval_without_a_run(tmp_path, capsys):
    assert "no such file" in fails(["eval", "--checkpoint", tmp_path], capsys)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_a_truncated_checkpoint(damaged, keep, capsys):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "not usable as weights" in fails(["eval", "--checkpoint", damaged], capsys)


def test_a_checkpoint_of_another_model(damaged, capsys):
    save_file({"weight": torch.zeros(2)}, damaged / "model.safetensors")
    assert "not usable as weights" in fails(["eval", "--checkpoint", damaged], capsys)


def test_a_pickle_is_not_executed(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    torch.save({"state_dict": Bomb()}, tmp_path / "model.pt")
    assert "not usable as weights" in fails(
        ["tune", "--pretrained", tmp_path / "model.pt", "--out", tmp_path / "r"], capsys
    )
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("content", [[1], "text", {"state_dict": {}}], ids=["list", "text", "empty"])
def test_files_that_are_no_weights(tmp_path, content, capsys):
    torch.save(content, tmp_path / "model.pt")
    arguments = ["tune", "--pretrained", tmp_path / "model.pt", "--out", tmp_path / "run"]
    assert "not usable as weights" in fails(arguments, capsys)


def test_eval_takes_the_runs_own_checkpoint_only(run, capsys):
    assert "folder of a run" in fails(["eval", "--checkpoint", run[0] / "other.safetensors"], capsys)


def test_a_tokenizer_that_cannot_be_had(monkeypatch, tmp_path, capsys):
    def get_tokenizer(name):
        raise OSError("We couldn't connect to load the files.")

    monkeypatch.setattr(open_clip, "get_tokenizer", get_tokenizer)
    error = fails(["tune", "--out", tmp_path / "run"], capsys)
    assert "tokenizer of glyph-tiny" in error and "couldn't connect" in error and "pip install" in error


def test_the_transform_of_a_tag_does_not_need_its_weights():
    tag = "laion2b_s32b_b82k"  # normalised with 0.5, where OpenAI's models take 0.48145466
    _, transform, _ = load_model("ViT-L-14", tag, torch.device("cpu"), architecture_only=True)
    assert "0.5, 0.5, 0.5" in str(transform)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "not readable as YAML"), ("just text", "expected a mapping"), ("colour: red", "unknown setting"),
     ("shots: many", "shots must be")],
)  # fmt: skip
def test_a_damaged_config(damaged, text, message, capsys):
    (damaged / "config.yaml").write_text(text)
    assert message in fails(["eval", "--checkpoint", damaged], capsys)


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "class_sampled_ce" in out
