"""bench.report: every table of README and docs is made of the rows that count, and only of them."""

from __future__ import annotations

import csv

from bench import measure, report
from bench.pages.cells import MACHINE_SHOWN
from bench.rows import KINDS, all_rows, latest, machine_columns


def step(implementation: str, C: int, ms: object = "", **values: object) -> dict[str, str]:
    machine = {"commit": "abc", "threads": 2, "python": "3.11", "torch": "2.13"} | MACHINE_SHOWN
    case = {"model": "ViT-B-16", "B": 4, "C": C, "precision": "fp32", "implementation": implementation, "p50_ms": ms}
    sizes = {"K": 20, "saved_mib": 100, "peak_mib": 200, "above_floor": 1.5, "faster": "", "note": ""}
    return {name: str(value) for name, value in (machine | case | sizes | values).items()}


def test_committed_pages_match_the_rows(capsys):
    """Every table: with ratios of one run, losses, reasons why nothing was measured, and intervals of the study."""
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_rows_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine_columns(measure.CPU)["commit"] == "unknown"


def test_latest_keeps_the_last_row_but_no_skipped_one():
    measured, skipped = step("published", 10, 1.0), step("published", 10, note="left out: no time left")
    no_room, kind = step("published", 10, note="does not fit: 10 classes …"), KINDS["step"]
    assert latest([measured, step("published", 10, 3.0)], kind)[0]["p50_ms"] == "3.0"
    assert latest([measured, skipped], kind) == [measured]
    assert latest([skipped, measured], kind) == [measured]
    assert latest([measured, no_room], kind) == [no_room]


def test_read_leaves_out_rows_of_one_round_and_of_another_pytorch(results):
    once, old, prediction, new = (
        step("published", 10, ms, rounds=rounds, torch=torch)
        for ms, rounds, torch in ((1.0, 1, "2.15"), (1.0, 3, "2.13"), ("", "", "2.15"), (1.0, 3, "2.15"))
    )
    (results / "cpu").mkdir()
    with (results / "cpu/step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(once))
        writer.writeheader()
        writer.writerows([once, old, prediction, new])
    assert all_rows("step") == [prediction, new] and all_rows("step", p50_ms="3.0", C="11") == []


def test_check_names_stale_files_and_writes_nothing(tmp_path, monkeypatch, capsys):
    right, readme = (report.ROOT / "README.md").read_text(), tmp_path / "README.md"
    monkeypatch.setattr(report, "PAGES", {"README.md": report.PAGES["README.md"]})
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / report.PICTURE).parent.mkdir(parents=True)
    readme.write_text(right.replace("times as fast |", "times as slow |"))
    assert report.main(["--check"]) == 1 and readme.read_text() != right
    assert capsys.readouterr().out == "README.md is out of date: python -m bench.report\n"
    assert report.main([]) == 0 == report.main(["--check"])
    assert readme.read_text() == right and (tmp_path / report.PICTURE).read_text().startswith("<svg")
