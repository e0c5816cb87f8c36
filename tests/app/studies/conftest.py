"""Studies with runs that complete immediately, or that run in this process."""

from __future__ import annotations

import json

import pytest

from skipkernels.app.config import TuneConfig
from skipkernels.app.studies import runs
from tests.app.report.pages import metrics as metrics_of_page


@pytest.fixture
def ran(monkeypatch):
    """Configurations of the runs that would have started. Each completes immediately."""
    found = []

    def complete(config: TuneConfig) -> dict:
        found.append(config)
        value = 10.0 * len(found)
        seconds = {"seconds_total": value, "seconds_tuning": value, "seconds_per_epoch": None}
        metrics = metrics_of_page(
            protocol=config.protocol,
            zero_shot={"base": 5.0, "new": None},
            tuned={"base": value, "new": None},
            images={"tests": {}},
            cost=metrics_of_page()["cost"] | seconds | {"milliseconds_per_step": None, "peak_memory_mib": 100.0},
        )
        assert config.out is not None
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "config.yaml").write_text(config.to_yaml())
        (config.out / "metrics.json").write_text(json.dumps(metrics))
        return metrics

    monkeypatch.setattr(runs, "_in_subprocess", complete)
    return found


@pytest.fixture
def own(tmp_path):
    """Configuration of runs on a folder of images, which are empty files."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "photos" / name / f"{number}.png").touch()
    return TuneConfig(data=f"imagefolder:{tmp_path / 'photos'}", shots=2, device="cpu")


@pytest.fixture
def in_process(monkeypatch):
    """Run in this process: a new one imports PyTorch for seconds."""
    monkeypatch.setattr(runs, "_in_subprocess", runs._run)
