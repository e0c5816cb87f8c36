"""The tuner in several processes, with the variables of torchrun: results of one process, and a process that fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import evaluate_run, tune, tuning
from skipkernels.app.train.processes import Processes, join
from skipkernels.app.train.run import Run
from tests.app.runs import files, losses, rows, shortened, small
from tests.processes import run_in_processes

SLACK = 1e-4  # relative, of fp32 after twelve steps: sums in another order; a wrong scale of gradients gives 1e-1

# Settings of each run in one process and in two; the last batch of 12 images leaves a process without images.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged": {"batch_size": 11, "optimizer": "AdamW", "text_lr": 1e-4, "image_lr": 1e-4, "sampler": "random"}
    | {"validation": 0.5, "cache": Path("cache"), "cache_dtype": "fp32"},
}


IMAGES = [(Image.new("RGB", (32, 32), (120 * number, 9, 9)), number % 2) for number in range(4)]


def let_accuracy_fall(patch: pytest.MonkeyPatch) -> None:
    """Validation accuracies that fall, so that the first epoch is the best."""
    end = Run._end_epoch

    def ended(self, row, evaluation):
        end(self, row | {"validation": row["validation"] and -row["epoch"]}, evaluation)

    patch.setattr(Run, "_end_epoch", ended)


def config_of(name: str, folder: Path, **changes: Any) -> TuneConfig:
    settings = RUNS[name] | changes
    if "cache" in settings:
        settings["cache"] = folder / "cache"
    return small(folder / name, **settings)


@shortened()
def two(rank: int, folder: Path) -> dict[str, Any]:
    """Runs in each of two processes."""
    let_accuracy_fall(pytest.MonkeyPatch())
    found: dict[str, Any] = {name: json.dumps(tune(config_of(name, folder))) for name in RUNS}
    found["finished"] = json.dumps(tune(config_of("plain", folder, resume=True)))
    found["evaluated"] = json.dumps(evaluate_run(folder / "plain"))
    one_test_image = {"dataset": IMAGES, "test": IMAGES[:1], "classes": ["a", "b"], "max_classes": None}
    for settings in ({"seed": rank}, one_test_image):
        with pytest.raises(InputError) as refused:
            tune(small(folder / "refused"), **settings)
        found |= {f"refused {next(iter(settings))}": str(refused.value)}
    return found


@shortened()
def tune_until_killed(rank: int, folder: Path) -> str:
    """Tune in two processes, the second of which is killed in the second epoch; return the error of the other one."""
    whole, calls = Skip.step, iter(range(1, 1000))

    def step(self, *args):
        if next(calls) == 9 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *args)

    Skip.step = step
    with pytest.raises(RuntimeError) as error:
        tune(small(folder / "run"))
    return str(error.value)


def assert_same_run(got: Path, expected: Path) -> None:
    assert losses(got) == pytest.approx(losses(expected), rel=SLACK)
    for row, other in zip(rows(got), rows(expected), strict=True):
        for name in ("kept_classes", "lr", "steps"):
            assert row[name] == other[name]
        # Rounding may change the class of an image with two nearly equal logits.
        assert row["accuracy"] == pytest.approx(other["accuracy"], abs=3.0)
    weights, others = (load_file(folder / "model.safetensors") for folder in (got, expected))
    change = sum((weights[name].double() - x).norm() ** 2 for name, x in others.items()) ** 0.5
    assert change <= SLACK * sum(x.double().norm() ** 2 for x in others.values()) ** 0.5
    assert files(got) == files(expected)


@pytest.mark.slow
def test_runs_in_two_processes(run, tmp_path_factory, monkeypatch):
    one, folder = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(run_in_processes, 2, folder, two, folder)
        let_accuracy_fall(monkeypatch)
        for name in RUNS.keys() - {"plain"}:
            tune(config_of(name, one))
        processes = waiting.result()
    for name, settings in RUNS.items():
        assert_same_run(folder / name, run[0] if name == "plain" else one / name)
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert [metrics["processes"], metrics["batch_size"]] == [2, settings.get("batch_size", 4)]
        assert all(json.loads(each[name]) == metrics for each in processes), "returned on both"
    assert json.loads(processes[0]["ragged"])["best_epoch"] == 1
    for each in processes:
        assert each["finished"] == each["plain"], "a complete run is not resumed"
        assert json.loads(each["evaluated"]) == json.loads(each["plain"])["tuned"]
        assert "generator must be equal on all processes" in each["refused seed"], "raised on both"
        assert "the test 'all' must have an image for each process; got 1 and 2" in each["refused dataset"]
    assert list((folder / "cache").glob("texts-base/**/features/features.npy")), "the text features are stored too"


def test_killed_process_ends_the_other_and_one_process_continues(run, tmp_path):
    error, _ = run_in_processes(2, tmp_path, tune_until_killed, tmp_path, killed=[1])
    assert "timed out" not in error.lower(), "the other process does not wait for the timeout of the group"
    assert len(losses(tmp_path / "run")) == 1, "the second epoch was not completed"
    tune(small(tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", run[0])


def test_join_ends_after_the_timeout_if_a_process_is_missing(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"the 2 processes can't connect: .*[^.]\. Start them with torchrun"):
        join(timeout=1)
    assert time.monotonic() - began < 60


def test_error_of_a_process_is_left_to_torchrun(tmp_path, monkeypatch, capsys):
    """torchrun prints the traceback in the file that it names, once; the process prints nothing."""

    def fail(*_):
        raise RuntimeError("of a bug")

    monkeypatch.setattr("skipkernels.app.cli.doctor.DoctorCommand.execute", fail)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["doctor"]) == 1 and capsys.readouterr() == ("", "")
    assert "RuntimeError: of a bug" in (tmp_path / "error.json").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "zero-shot", "epochs": None}, "only skip trains in several processes; got zero-shot in 2"),
        ({"fused_optimizer": True}, "fused_optimizer: True is not supported in several processes"),
    ],
)
def test_setting_for_one_process_is_refused_in_two(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(tuning, "join", lambda timeout: Processes(0, 2))
    with pytest.raises(InputError, match=message):
        tune(small(tmp_path, **settings))


@pytest.mark.parametrize("count", [1, 4, 7])
def test_shares_are_consecutive(count):
    shares = [Processes(rank, 4).share(count) for rank in range(4)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
