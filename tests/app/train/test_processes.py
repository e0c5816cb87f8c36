"""The tuner in several processes: results of one process, and a process that fails, under torchrun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.data.tasks import TestSet
from skipkernels.app.train import evaluate_run, tune
from skipkernels.app.train.processes import Processes
from skipkernels.app.train.run import Run, _check_processes
from skipkernels.app.train.setup import RunSetup
from skipkernels.features import FeatureCache
from tests.app.runs import files, losses, rows, shortened, small
from tests.app.train import fail_at_step
from tests.processes import run_in_processes

ROOT = Path(__file__).parents[3]
SLACK = 1e-4  # relative, of fp32 after twelve steps: sums in another order; a wrong scale of gradients gives 1e-1

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
    complete = Run._complete

    def completed(self, row, *others):
        complete(self, row | {"validation": row["validation"] and -row["epoch"]}, *others)

    patch.setattr(Run, "_complete", completed)


def config_of(name: str, folder: Path, **changes: Any) -> TuneConfig:
    settings = RUNS[name] | changes
    if "cache" in settings:
        settings["cache"] = folder / "cache"
    return small(folder / name, **settings)


def failing(size: int, kind: str, step: int, out: Path) -> subprocess.CompletedProcess[str]:
    """Tune under torchrun in `size` processes, the second of which fails in a step."""
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {size} -m {fail_at_step.__name__} {kind} {step}"
    settings = "tune --data glyphs --shots 4 --classes 12 --epochs 2 --device cpu --out"
    command = [sys.executable, *launch.split(), *settings.split(), str(out)]
    # Less than the timeout of the group, for which the other processes would wait.
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


# ---- in each process ---------------------------------------------------------------------------------------------


@shortened()
def four(rank: int, folder: Path) -> dict[str, Any]:
    return {"ragged": json.dumps(tune(config_of("ragged", folder)))}


@shortened()
def two(rank: int, folder: Path, killed: Path) -> dict[str, Any]:
    let_accuracy_fall(pytest.MonkeyPatch())
    FeatureCache.build.__func__.__kwdefaults__["shard_bytes"] = 1  # a batch per shard: also for the second process
    found: dict[str, Any] = {name: json.dumps(tune(config_of(name, folder))) for name in IN_PROCESSES[2]}
    found["finished"] = json.dumps(tune(config_of("plain", folder, resume=True)))
    found["evaluated"] = json.dumps(evaluate_run(folder / "plain"))
    found["resumed"] = json.dumps(tune(small(killed, resume=True)))
    with pytest.raises(InputError) as differing:
        tune(small(folder / "seed", seed=rank))
    return found | {"differing": str(differing.value)}


# ---- their results -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run in three processes, one of which is killed in the second epoch."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    return folder, failing(3, "kill", 9, folder)


@pytest.fixture(scope="module")
def several(one, killed, tmp_path_factory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    """Runs in several processes, by their number; those in one process, in the folder `one`, are made meanwhile."""
    folders = {size: tmp_path_factory.mktemp(f"{size}") for size in (4, 2)}
    shutil.copytree(killed[0], folders[2] / "killed")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(run_in_processes, 4, folders[4], four, folders[4])
        for name in RUNS:
            tune(config_of(name, one))
        by_four = waiting.result()
    by_two = run_in_processes(2, folders[2], two, folders[2], folders[2] / "killed")
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
def test_runs_in_several_processes(one, several, killed):
    """One test, so that one worker of the test runner makes these runs."""
    for size, names in IN_PROCESSES.items():
        folder, processes = several[size]
        for name in names:
            # In bf16 the rounding of one step moves the next.
            assert_same_run(folder / name, one / name, 1e-2 if "precision" in RUNS[name] else SLACK)
            metrics = json.loads((folder / name / "metrics.json").read_text())
            assert [metrics["processes"], metrics["batch_size"]] == [size, RUNS[name].get("batch_size", 4)]
            assert all(json.loads(each[name]) == metrics for each in processes), "returned on all"
    folder, processes = several[2]
    assert all(each["finished"] == each["plain"] for each in processes), "a complete run is not resumed"
    assert all(json.loads(each["evaluated"]) == json.loads(each["plain"])["tuned"] for each in processes)
    assert len(list((folder / "cache" / "train").glob("*.safetensors"))) > 1, "both processes have built it"
    assert list((folder / "cache").glob("texts-base/**/features/*.safetensors")), "the text features are stored too"
    assert_same_run(folder / "killed", one / "plain")  # three, then two
    check_killed(*killed, one / "plain")
    for each in processes:
        assert "generator must be equal on all processes" in each["differing"], "raised on both"


def check_killed(folder: Path, launched: subprocess.CompletedProcess[str], expected: Path) -> None:
    """A killed process ends all, and the run continues in one process."""
    assert launched.returncode == 1
    assert "Signal 9 (SIGKILL) received" in launched.stderr
    assert len(losses(folder)) == 1, "the second epoch was not completed"
    tune(small(folder, resume=True))
    assert_same_run(folder, expected)


@pytest.mark.slow
def test_error_of_one_process_ends_all_and_is_shown_once(tmp_path):
    launched = failing(2, "raise", 3, tmp_path / "run")
    assert launched.returncode == 1
    assert launched.stderr.count("RuntimeError: of a bug") == 1
    assert launched.stdout == "", "the table of the first process"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "zero-shot"}, "only skip trains in several processes; got zero-shot in 2"),
        ({"fused_optimizer": True}, "fused_optimizer: True is not supported in several processes"),
    ],
)
def test_setting_for_one_process_is_refused_in_two(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        _check_processes(small(tmp_path, **settings), Processes(0, 2))


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
