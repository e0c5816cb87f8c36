"""The tuner in several processes: results of one process, errors raised on all, and resuming with another number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import skipkernels.experiments  # noqa: F401  (registers glyphs and the model)
from skipkernels.tuner import TuneConfig, checkpoint, tune
from skipkernels.tuner.methods import Skip
from skipkernels.tuner.processes import Processes
from tests.processes import together
from tests.tuner.runs import files, losses, rows, small

ERRORS = [
    ("settings", "InputError", "shots must be from 1 to 1000; got 0"),
    ("method", "InputError", "only skip trains in several processes; got zero-shot in 2"),
    ("fused", "InputError", "fused_optimizer: True is not supported in several processes"),
    ("seed", "InputError", "generator must be equal on all processes"),
    ("earlier", "InputError", "contains an earlier run"),
    ("disk", "InputError", "the checkpoint can't be written to .*: No space left on device"),
    ("bug", "RuntimeError", "of a bug"),
]
SLACK = 1e-4  # relative, of fp32 after twelve steps: sums in another order; a wrong scale of gradients gives 1e-1

# Settings of each run in one process and in several; batches of 5 leave processes without images.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged": {"batch_size": 5, "optimizer": "AdamW", "text_lr": 1e-4, "image_lr": 1e-4, "sampler": "random"},
    "cached": {"cache": Path("cache"), "views": 2, "precision": "bf16", "epochs": 1},
}


def config_of(name: str, folder: Path, **changes: Any) -> TuneConfig:
    settings = RUNS[name] | changes
    if "cache" in settings:
        settings["cache"] = folder / "cache"
    return small(folder / name, **settings)


def stop_in_step(number: int, error: BaseException) -> None:
    """Raise an error in a step of this process; the process ends with the test."""
    calls, whole = iter(range(1, 1000)), Skip.step

    def until(self, *args):
        if next(calls) == number:
            raise error
        return whole(self, *args)

    Skip.step = until


def caught(config: TuneConfig) -> list[str]:
    """Type, origin and message of the error of a run."""
    try:
        tune(config)
    except BaseException as error:
        return [type(error).__name__, "reported" if getattr(error, "reported", False) else "own", str(error)]
    return []


# ---- in each process ---------------------------------------------------------------------------------------------


def in_process(rank: int, size: int, folder: Path, one: Path) -> dict[str, Any]:
    names = RUNS if size == 2 else ("ragged",)
    found: dict[str, Any] = {name: json.dumps(tune(config_of(name, folder))) for name in names}
    if size == 2:
        found["finished"] = json.dumps(tune(config_of("plain", folder, resume=True)))
        found["resumed"] = json.dumps(tune(small(one / "cut", resume=True)))  # cut in one process
        found["errors"] = errors(rank, folder)
    if size == 4:
        stop_in_step(9, KeyboardInterrupt())
        found["cut"] = caught(small(folder / "cut"))
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
    with pytest.MonkeyPatch.context() as patch:

        def full(*arguments):
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint, "write_tensors", full)
        found["disk"] = caught(small(folder / "disk"))
    stop_in_step(9, RuntimeError("of a bug") if rank else RuntimeError("gloo: connection closed"))
    found["bug"] = caught(small(folder / "bug"))
    return found


# ---- their results -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Runs in one process, and one that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("one")
    for name in RUNS:
        tune(config_of(name, folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Skip, "step", Skip.step)
        stop_in_step(9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tune(small(folder / "cut"))
    return folder


@pytest.fixture(scope="module")
def several(one, tmp_path_factory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    found = {}
    for size in (4, 2):
        folder = tmp_path_factory.mktemp(f"{size}")
        found[size] = folder, together(size, folder, in_process, size, folder, one)
    return found


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


def test_runs_in_several_processes(one, several):
    """One test, so that one worker of the test runner makes these runs."""
    for name in RUNS:
        for folder, processes in several.values():
            if name in processes[0]:
                # In bf16 the rounding of one step moves the next.
                assert_same_run(folder / name, one / name, 1e-2 if "precision" in RUNS[name] else SLACK)
                metrics = (folder / name / "metrics.json").read_text()
                assert all(json.loads(each[name]) == json.loads(metrics) for each in processes), "returned on all"
    assert all(each["finished"] == each["plain"] for each in several[2][1]), "a complete run is not resumed"
    check_resumed(one, several)
    for case in ERRORS:
        check_error(several, *case)


def check_resumed(one, several):
    assert_same_run(one / "cut", one / "plain")  # one, then two processes
    folder, processes = several[4]
    for kind, _, message in (each["cut"] for each in processes):
        assert kind == "KeyboardInterrupt" and "1 of 2 epochs are complete" in message
    assert "interrupted" in (folder / "cut" / "metrics.json").read_text()
    tune(small(folder / "cut", resume=True))  # four, then one
    assert_same_run(folder / "cut", one / "plain")


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
