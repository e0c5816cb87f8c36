"""bench.report: which rows count, and pages and pictures made of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import report
from bench.pages import operators
from bench.rows import KINDS, Device, latest


def step(implementation: str, C: int, ms: object = "", **values: object) -> dict[str, str]:
    machine = {"commit": "abc", "device": "CPU (avx2)", "threads": 2, "python": "3.11", "torch": "2.13"}
    case = {"model": "ViT-B-16", "B": 4, "C": C, "precision": "fp32", "implementation": implementation, "p50_ms": ms}
    sizes = {"K": 20, "saved_mib": 100, "peak_mib": 200, "above_floor": 1.5, "faster": "", "note": ""}
    return {name: str(value) for name, value in (machine | case | sizes | values).items()}


def save(root: Path, *rows: dict[str, str], kind: str = "step") -> Device:
    folder = root / "bench" / "results" / "cpu"
    folder.mkdir(parents=True)
    with (folder / f"{kind}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Device(folder)


def test_committed_pages_match_the_rows(capsys):
    """Every table: with ratios of one run, losses, reasons why nothing was measured, and intervals of the study."""
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_latest_keeps_the_last_row_but_no_skipped_one():
    measured, skipped = step("published", 10, 1.0), step("published", 10, note="left out: no time left")
    no_room, kind = step("published", 10, note="does not fit: 10 classes …"), KINDS["step"]
    assert latest([measured, step("published", 10, 3.0)], kind)[0]["p50_ms"] == "3.0"
    assert latest([measured, skipped], kind) == [measured]
    assert latest([skipped, measured], kind) == [measured]
    assert latest([measured, no_room], kind) == [no_room]


def test_read_leaves_out_rows_of_one_round_and_of_another_pytorch(tmp_path):
    once, old, prediction, new = (
        step("published", 10, ms, rounds=rounds, torch=torch)
        for ms, rounds, torch in ((1.0, 1, "2.15"), (1.0, 3, "2.13"), ("", "", "2.15"), (1.0, 3, "2.15"))
    )
    assert save(tmp_path, once, old, prediction, new).all_rows("step") == [prediction, new]


def test_check_names_stale_files_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for name, blocks in (report.BLOCKS | report.STUDIES).items():
        places = "".join(f"<!-- bench:{block} -->\n<!-- /bench:{block} -->\n" for block in blocks)
        (tmp_path / name).write_text(f"before\n{places}after\n")
    save(tmp_path, step("skipkernels", 1000, 100), step("published", 1000, 510, faster=5.1, saved_mib=900))
    before = (tmp_path / "README.md").read_text()
    assert report.main(["--root", str(tmp_path), "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out and (tmp_path / "README.md").read_text() == before
    assert report.main(["--root", str(tmp_path)]) == 0 == report.main(["--root", str(tmp_path), "--check"])
    assert "5.10 times as fast" in (tmp_path / "README.md").read_text()


def test_trainers_compares_two_rows_of_one_case(tmp_path):
    """bf16 is another case; two cases of a trainer have no line that could show both."""
    rows = [
        step(name, 500, ms, trainer="lightning", precision=precision)
        for precision, times in (("fp32", (600, 200)), ("bf16", (300, 100)))
        for name, ms in zip(("naive", "skipkernels"), times, strict=True)
    ]
    shown = operators.trainers(save(tmp_path / "pair", *rows, kind="trainers"))
    assert "| Lightning | 600 ms → 200 ms | 3.00 | 100 MiB → 100 MiB |" in shown
    more = [*rows, step("naive", 1000, 900, trainer="lightning")]
    with pytest.raises(ValueError, match="must have a row of naive and one of skipkernels; got 3 rows"):
        operators.trainers(save(tmp_path / "more", *more, kind="trainers"))
