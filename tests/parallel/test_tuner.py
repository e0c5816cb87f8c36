"""The tuner in several processes: results of one process, errors raised on all, processes that are killed or stopped,
and resuming with another number.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.data.tasks import TestSet
from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import checkpoint, evaluate_run, tune
from skipkernels.app.train.processes import Processes, _group_name
from skipkernels.app.train.run import _Run
from skipkernels.app.train.setup import RunSetup
from skipkernels.features import FeatureCache
from skipkernels.store import writer
from tests.app.train.runs import files, losses, rows, shortened, small
from tests.processes import together

ERRORS = [
    ("settings", "InputError", "shots must be from 1 to 1000; got 0"),
    ("method", "InputError", "only skip trains in several processes; got zero-shot in 2"),
    ("fused", "InputError", "fused_optimizer: True is not supported in several processes"),
    ("seed", "InputError", "generator must be equal on all processes"),
    ("earlier", "InputError", "contains an earlier run"),
    ("disk", "InputError", "the checkpoint can't be written to .*: No space left on device"),
    ("cache disk", "StoreError", r"the disk is full. \d+ of \d+ shards exist and stay"),
    ("interrupt", "KeyboardInterrupt", "no epoch is complete"),
    ("bug", "RuntimeError", "Process 1 raised RuntimeError: of a bug|^of a bug"),
]
SLACK = 1e-4  # relative, of fp32 after twelve steps: sums in another order; a wrong scale of gradients gives 1e-1
KILLED, STOPPED = 3, 2  # among four processes

# Settings of each run in one process and in several; batches of 5 leave processes without images.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged": {"batch_size": 5, "optimizer": "AdamW", "text_lr": 1e-4, "image_lr": 1e-4, "sampler": "random"},
    "validated": {"validation": "split"},
    "cached": {"cache": Path("cache"), "views": 3, "precision": "bf16", "epochs": 1},
}
IN_PROCESSES = {2: ("plain", "validated", "cached"), 4: ("ragged",)}


@pytest.fixture(scope="module", autouse=True)
def first_is_best():
    """Validation accuracies that fall, in the rows of each epoch."""
    with shortened(), pytest.MonkeyPatch.context() as patch:
        let_accuracy_fall(patch)
        yield


def let_accuracy_fall(patch: pytest.MonkeyPatch) -> None:
    complete = _Run._complete

    def completed(self, row, *others):
        complete(self, row | {"validation": row["validation"] and -row["epoch"]}, *others)

    patch.setattr(_Run, "_complete", completed)


def config_of(name: str, folder: Path, **changes: Any) -> TuneConfig:
    settings = RUNS[name] | changes
    if "cache" in settings:
        settings["cache"] = folder / "cache"
    return small(folder / name, **settings)


def in_step(number: int, act: Callable[[], None]) -> pytest.MonkeyPatch:
    """Call a function in a step of this process; returns what to undo."""
    calls, whole, patch = iter(range(1, 1000)), Skip.step, pytest.MonkeyPatch()

    def step(self, *args):
        if next(calls) == number:
            act()
        return whole(self, *args)

    patch.setattr(Skip, "step", step)
    return patch


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def caught(config: TuneConfig) -> list[str]:
    """Type, origin and message of the error of a run."""
    try:
        tune(config)
    except BaseException as error:
        return [type(error).__name__, "reported" if getattr(error, "reported", False) else "own", str(error)]
    return []


# ---- in each process ---------------------------------------------------------------------------------------------


@shortened()
def four(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"ragged": json.dumps(tune(config_of("ragged", folder)))}
    pid = folder / "pid"
    if rank == STOPPED:
        pid.write_text(str(os.getpid()))
    began, config = time.monotonic(), small(folder / "stopped", timeout=10.0)
    patch = in_step(2, lambda: os.kill(os.getpid(), signal.SIGSTOP) if rank == STOPPED else None)
    found["stopped"] = [*caught(config), str(time.monotonic() - began)]
    patch.undo()
    if rank != STOPPED:
        os.kill(int(pid.read_text()), signal.SIGCONT)
    in_step(9, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == KILLED else None)
    found["killed"] = caught(small(folder / "killed"))
    return found


@shortened()
def two(rank: int, folder: Path, killed: Path) -> dict[str, Any]:
    let_accuracy_fall(pytest.MonkeyPatch())
    FeatureCache.build.__func__.__kwdefaults__["shard_bytes"] = 1  # a batch per shard: also for the second process
    found: dict[str, Any] = {name: json.dumps(tune(config_of(name, folder))) for name in IN_PROCESSES[2]}
    found["finished"] = json.dumps(tune(config_of("plain", folder, resume=True)))
    found["evaluated"] = json.dumps(evaluate_run(folder / "plain"))
    found["resumed"] = json.dumps(tune(small(killed, resume=True)))
    found["errors"] = errors(rank, folder)
    return found


def errors(rank: int, folder: Path) -> dict[str, list[str]]:
    only_second = {"shots": 0} if rank else {}
    found = {
        "settings": caught(small(folder / "settings", **only_second)),
        "method": caught(small(folder / "method", method="zero-shot", epochs=0)),
        "fused": caught(small(folder / "fused", fused_optimizer=True)),
        "seed": caught(small(folder / "seed", seed=rank)),
        "earlier": caught(small(folder / "plain")),
    }

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        found["disk"] = caught(small(folder / "disk", epochs=1))
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            write = writer.write_shard
            patch.setattr(writer, "write_shard", lambda at, *rest: (write if "texts-" in str(at) else full)(at, *rest))
        # Of three views, the second process writes a shard.
        found["cache disk"] = caught(small(folder / "cache disk", cache=folder / "full", views=3))
    for name, error in {"interrupt": KeyboardInterrupt(), "bug": RuntimeError("of a bug")}.items():
        patch = in_step(3, raising(error) if rank else lambda: None)
        began = time.monotonic()
        found[name] = caught(small(folder / name))
        assert time.monotonic() - began < 100, "before the timeout of a collective"
        patch.undo()
    return found


# ---- their results -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def several(one, tmp_path_factory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    """Runs in several processes, by their number; those in one process, in the folder `one`, are made meanwhile."""
    folders = {size: tmp_path_factory.mktemp(f"{size}") for size in (4, 2)}
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(together, 4, folders[4], four, folders[4], killed=[KILLED])
        for name in RUNS:
            tune(config_of(name, one))
        by_four = waiting.result()
    interrupted = losses(folders[4] / "killed")
    assert len(interrupted) == 1, "the second epoch was not completed"
    by_two = together(2, folders[2], two, folders[2], folders[4] / "killed")
    return {4: (folders[4], by_four), 2: (folders[2], by_two)}


def assert_same_run(got: Path, expected: Path, slack: float = SLACK) -> None:
    assert losses(got) == pytest.approx(losses(expected), rel=slack)
    for row, other in zip(rows(got), rows(expected), strict=True):
        assert [row[name] for name in ("kept_histogram", "lr", "steps")] == [
            other[name] for name in ("kept_histogram", "lr", "steps")
        ]
        # Rounding may change the class of an image with two nearly equal logits.
        assert row["accuracy"] == pytest.approx(other["accuracy"], abs=3.0)
    weights, others = (load_file(folder / "model.safetensors") for folder in (got, expected))
    change = sum((weights[name].double() - x).norm() ** 2 for name, x in others.items()) ** 0.5
    assert change <= slack * sum(x.double().norm() ** 2 for x in others.values()) ** 0.5
    assert files(got) == files(expected)


@pytest.mark.slow
def test_runs_in_several_processes(one, several):
    """One test, so that one worker of the test runner makes these runs."""
    for size, names in IN_PROCESSES.items():
        folder, processes = several[size]
        for name in names:
            # In bf16 the rounding of one step moves the next.
            assert_same_run(folder / name, one / name, 1e-2 if "precision" in RUNS[name] else SLACK)
            metrics = json.loads((folder / name / "metrics.json").read_text())
            assert [metrics["processes"], metrics["batch_size"]] == [size, RUNS[name].get("batch_size", 4)]
            assert all(json.loads(each[name]) == metrics for each in processes if each is not None), "returned on all"
    folder, processes = several[2]
    assert all(each["finished"] == each["plain"] for each in processes), "a complete run is not resumed"
    assert all(json.loads(each["evaluated"]) == json.loads(each["plain"])["tuned"] for each in processes)
    assert len(list((folder / "cache" / "train").glob("*.safetensors"))) > 1, "both processes have built it"
    assert list((folder / "cache").glob("texts-base/**/features/*.safetensors")), "the text features are stored too"
    check_lost(several[4][1])
    assert_same_run(several[4][0] / "killed", one / "plain")  # four, then two
    for case in ERRORS:
        check_error(several, *case)
    assert list((folder / "full").glob("*/*.safetensors")), "what the first process wrote stays"


def check_lost(processes):
    """A process that is stopped or killed is named on all others."""
    assert processes[KILLED] is None
    present = [each for each in processes if each is not None]
    for case, number in {"stopped": STOPPED, "killed": KILLED}.items():
        found = [each[case] for each in present]
        own = [origin for _, origin, *_ in found].count("own")
        assert own == 1 or (own == 0 and case == "stopped"), "once; the process that is killed later may have it"
        for kind, _, message, *_ in found:
            assert kind == "ProcessError"
            assert f"lost the connection to process {number}, which was killed or stopped" in message
    assert max(float(each["stopped"][3]) for each in present) < 100


def check_error(several, name, kind, message):
    """The first error is raised on every process."""
    found = [each["errors"][name] for each in several[2][1]]
    assert sorted(origin for _, origin, _ in found) == ["own", "reported"], "the command line prints it once"
    for got, _, text in found:
        assert got == kind
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(text)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_shares_are_consecutive(count):
    shares = [Processes(rank, 4).share(count) for rank in range(4)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("cached", [False, True])
def test_test_with_fewer_images_than_processes(cached):
    setup: Any = SimpleNamespace(processes=Processes(0, 3), _cached=cached)
    with pytest.raises(InputError, match=r"the test 'new' must have an image for each process; got 2 and 3"):
        RunSetup._shared(setup, "test-new", TestSet("new", ["a"], (["an a"],), [0, 1]), False)


def test_restarted_processes_agree_on_a_new_name():
    """torchrun keeps the store: names of killed processes are in it, and the first may find them."""
    store, names = dist.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as threads:
            order = [2, 0, 1]  # the second starts last
            found = [(threads.submit(_group_name, store, rank, 3), time.sleep(0.1))[0] for rank in order]
            names.append({each.result() for each in found})
    assert [len(each) for each in names] == [1, 1, 1] and len(set.union(*names)) == 3
