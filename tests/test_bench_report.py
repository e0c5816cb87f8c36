"""bench.report: every table and picture is made from the stored rows, and losing comparisons are shown."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import report
from bench.pages import bars, readme
from bench.rows import KINDS, MACHINE, Device, latest, same_run

CPU, GPU = "CPU (avx2)", "GPU"
FULL, CLASSIFYING = "full fine-tuning", (("published", 10000), ("skipkernels", 7100))
EXTRA = {
    "step": "K peak_mib above_floor note faster saved_mib training_mib",
    "operators": "wanted note faster",
    "infer": "above_floor faster",
    "memory": "gradients_mib",
}


def row(kind: str, **values: object) -> dict[str, str]:
    of = KINDS[kind]
    columns = [*MACHINE, *of.case.split(), of.measured, *EXTRA.get(kind, "").split()]
    machine = {"commit": "abc", "device": CPU, "threads": 2, "python": "3.11", "torch": "2.13"}
    return {name: str(value) for name, value in (dict.fromkeys(columns, "") | machine | values).items()}


def step(implementation: str, C: int, ms: object = "", precision: str = "fp32", **values: object) -> dict[str, str]:
    case = {"model": "ViT-B-16", "B": 4, "C": C, "K": min(C, 20), "precision": precision}
    sizes = {"saved_mib": 100, "peak_mib": 200, "above_floor": 1.5} if ms else {}
    return row("step", **case | {"implementation": implementation, "p50_ms": ms} | sizes | values)


def operator(implementation: str, shape: str = "N1", faster: object = "", **values: object) -> dict[str, str]:
    case = {"op": "class_scores", "shape": shape, "dtype": "fp32", "implementation": implementation, "p50_ms": 1}
    return row("operators", **case | {"faster": faster} | values)


def save(root: Path, kind: str, *rows: dict[str, str]) -> Device:
    folder = root / "bench" / "results" / re.sub(r"\W+", "-", rows[0]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{kind}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Device(folder)


@pytest.fixture
def root(tmp_path) -> Path:
    """A checkout with pages and without results."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, blocks in (report.BLOCKS | report.STUDIES).items():
        text = "".join(f"<!-- bench:{block} -->\n<!-- /bench:{block} -->\n" for block in blocks)
        (tmp_path / name).write_text(f"before\n{text}after\n")
    return tmp_path


def page(root: Path, name: str = "README.md") -> str:
    report.main(["--root", str(root)])
    return (root / name).read_text()


def test_committed_pages_match_the_rows(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_latest_keeps_the_last_row_but_no_skipped_one():
    measured, skipped = step("published", 10, 1.0), step("published", 10, note="left out: no time left")
    no_room, kind = step("published", 10, note="does not fit: 10 classes …"), KINDS["step"]
    assert latest([measured, step("published", 10, 3.0)], kind)[0]["p50_ms"] == "3.0"
    assert latest([measured, skipped], kind) == [measured]
    assert latest([skipped, measured], kind) == [measured]
    assert latest([measured, no_room], kind) == [no_room]


def test_read_leaves_out_rows_of_one_round_and_of_another_pytorch(root):
    once, old, old_prediction, prediction, new = (
        step("published", 10, ms, rounds=rounds, torch=torch, note=note)
        for ms, rounds, torch, note in (
            (1.0, 1, "2.15", ""),
            (1.0, 3, "2.13", ""),
            ("", "", "2.13", "does not fit"),
            ("", "", "2.15", "does not fit"),
            (1.0, 3, "2.15", ""),
        )
    )
    assert save(root, "step", once, old, old_prediction, prediction, new).all_rows("step") == [prediction, new]


def test_growth_compares_rows_of_one_commit_and_machine(root):
    few, many = step("skipkernels", 10, 100.0), step("skipkernels", 21841, 140.0)
    case = {"model": "ViT-B-16", "B": "4", "precision": "fp32"}
    assert readme.growth(*readme.few_and_many(save(root, "step", few, many), **case)) == (pytest.approx(1.4), 1.0)
    for other in ({"commit": "def"}, {"threads": "1"}, {"torch": "2.14"}, {"p50_ms": ""}):
        assert readme.few_and_many(save(root, "step", few, many | other), **case) is None
    assert same_run([few, many], many, C="10") == few and same_run([few, many], many, C="50") is None


def test_step_table_gives_the_reason_where_nothing_was_measured(root):
    save(
        root,
        "step",
        step("skipkernels", 10, 1268.9),
        step("published", 10, 3097.2, faster=2.441),
        step("published", 500, note="does not fit: 500 classes keep about 99.0 GiB"),
        step("published", 1000, note="left out: a step takes about 70 s"),
    )
    text = page(root, "docs/benchmarks.md")
    assert "| published | fp32 | 3,097 (2.44) | does not fit | not run: about 70 s |" in text
    assert "| skipkernels | fp32 | 1,269 |  |  |" in text
    assert "<sub>CPU (avx2), 2 threads; torch 2.13; commit abc; `python -m bench.step`</sub>" in text


def test_headline_uses_ratios_of_one_run(root):
    ours, published = step("skipkernels", 1000, 100), step("published", 1000, 510, faster=5.1, saved_mib=900)
    save(root, "step", ours, published, step("skipkernels", 10, 50.0), step("skipkernels", 21841, 75.0))
    text = page(root)
    assert "5.10 times as fast" in text and "900 MiB → 100 MiB" in text
    assert "1.50 times the time, 1.00 times the memory" in text


def test_claims_compare_rows_of_one_run(root):
    train = [step(name, 100, 9.0, training_mib=mib) for name, mib in ((FULL, 4000), ("published", 2500))]
    other = step("skipkernels", 100, 9.0, commit="def", training_mib=1000)
    too_large = [step(FULL, 1000, note="does not fit: 1000 classes …"), step("published", 1000, 9.0, training_mib=3000)]
    again = step(FULL, 100, 9.5)  # without --training: no reason to forget what was measured
    save(root, "step", *train, other, *too_large, again)
    case = {"model": "ViT-B-16", "images": 100, "B": 100, "C": 100, "precision": "fp32"}
    save(root, "infer", *(row("infer", **case, implementation=n, p50_ms=ms) for n, ms in CLASSIFYING))
    text = page(root, "docs/benchmarks.md")
    assert "| training, full fine-tuning | fp32 | 4,000 MiB | does not fit |" in text
    assert "| training, published | fp32 | 2,500 MiB (38 % less) | 3,000 MiB |" in text
    assert "| training, skipkernels | fp32 | 1,000 MiB |  |" in text
    assert "| classification, skipkernels | fp32 | 7.10 s (29 % less) |  |" in text
    assert "`python -m bench.step`, `python -m bench.infer`</sub>" in text


def test_losses_are_sorted(root):
    rows = [operator("eager", f"N{i}", faster=0.5 + i / 10) for i in range(8)]
    failed = operator("skipkernels", "N9", p50_ms="", note="wrong: error 1.0 > 0.1")
    save(root, "operators", *rows, operator("skipkernels", "N1"), failed)
    full = page(root, "docs/benchmarks.md")
    assert "faster in 5 of 8 comparisons" in full and "- `class_scores`, N9, fp32: wrong: error" in full
    assert re.findall(r"N(\d), fp32 \| eager \| \*\*", full) == ["0", "1", "2", "3", "4"]


def test_check_names_stale_files_and_writes_nothing(root, capsys):
    ours, published = step("skipkernels", 1000, 100), step("published", 1000, 510, faster=5.1, saved_mib=900)
    save(root, "step", ours, published)
    before = (root / "README.md").read_text()
    assert report.main(["--root", str(root), "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out and (root / "README.md").read_text() == before
    assert report.main(["--root", str(root)]) == 0 == report.main(["--root", str(root), "--check"])


def test_picture_is_reproducible():
    rows = [step("skipkernels", C, C) for C in (10, 100)]
    rows += [step("published", 10, 20), step("published", 100, note="does not fit: 100 classes")]
    svg = bars.step_bars(rows)
    assert svg == bars.step_bars(rows) and ElementTree.fromstring(svg).tag.endswith("svg") and not bars.step_bars([])
