"""`skipkernels report`."""

from __future__ import annotations

import shutil

import pytest

from skipkernels.app.cli.main import main
from skipkernels.app.report.run_page import run_report
from tests.app.report.pages import (
    Page,
)
from tests.app.runs import fails


def test_report_command_repeats_the_page(run, tmp_path, capsys):
    folder, _ = run
    expected = (folder / "report.html").read_text()
    assert run_report(folder) == expected
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").read_text() == expected
    found = Page(expected)
    assert found.named("img") and "skipkernels tune --shots 2 --max-classes 24 --method skip --epochs 2" in found.text
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.json"):
        shutil.copy(folder / name, tmp_path / "run")
    assert "skipkernels tune" in run_report(tmp_path / "run"), "without predictions and rows"
    assert main(["report", str(tmp_path)]) == 2
    assert "has no results. Name the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.json", "metrics.jsonl"])
def test_report_of_truncated_metrics_is_one_line(run, tmp_path, capsys, name):
    for file in ("config.yaml", "metrics.json", "metrics.jsonl"):
        shutil.copy(run[0] / file, tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text()[:-5])
    error = fails(["report", tmp_path], capsys)
    assert f"{tmp_path / name}: damaged (" in error and len(error) < 400
