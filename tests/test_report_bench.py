"""What `bench.report` writes: all of it from the stored rows, the last of each case, and nothing is hidden."""

from __future__ import annotations

import csv
import doctest
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from bench import markdown, pictures, report, stored
from bench.report import Report, filled, growth_of
from bench.stored import Device, beside, latest, read
from skipkernels.tuner import plots

CPU, GPU = "CPU (avx2)", "GPU"
PAGES = {
    "README.md": "headline step pictures memory infer glyphs lose",
    "docs/benchmarks.md": "goals lose devices",
    "docs/operators.md": "operators",
}


def row(kind: str, **values: object) -> dict[str, str]:
    """With all columns of its kind, of which these are not empty."""
    of = stored.KINDS[kind]
    columns = [*stored.MACHINE, *of.case.split(), of.measured, *of.needed.split(), *EXTRA.get(kind, "").split()]
    machine = {"commit": "abc", "device": CPU, "threads": 2, "python": "3.11", "torch": "2.13"}
    return {name: str(value) for name, value in (dict.fromkeys(columns, "") | machine | values).items()}


EXTRA = {
    "step": "skip_layers p20_ms p80_ms rounds faster saved_mib gflop floor_ms launches graph_ms",
    "operators": "p20_ms p80_ms faster wanted peak_mib gbytes_s gflops_s",
    "infer": "faster",
    "epoch": "features_s training_s evaluation_s step_ms loss",
    "memory": "K saved_mib peak_mib",
    "profile": "peak_gflops",
    "glyphs": "new step_ms tuning_s peak_mib",
}


def step(who: str, C: int, ms: object = "", precision: str = "fp32", **values: object) -> dict[str, str]:
    times = {f"p{q}_ms": ms for q in (20, 50, 80)}
    case = {"model": "ViT-B-16", "B": 4, "C": C, "K": min(C, 20), "precision": precision, "who": who}
    sizes = {"saved_mib": 100, "peak_mib": 200, "above_floor": 1.5} if ms else {}
    return row("step", **case | times | sizes | values)


def operator(who: str, shape: str = "N1", faster: object = "", dtype: str = "fp32", **values: object) -> dict[str, str]:
    case = {"op": "class_scores", "shape": shape, "dtype": dtype, "who": who, "p50_ms": 1, "p20_ms": 1, "p80_ms": 1}
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
    """A checkout with pages, and no results yet."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, blocks in PAGES.items():
        text = "".join(f"<!-- bench:{block} -->\n<!-- /bench:{block} -->\n" for block in blocks.split())
        (tmp_path / name).write_text(f"before\n{text}after\n")
    return tmp_path


def page(root: Path, name: str = "README.md") -> str:
    report.main(["--root", str(root)])
    return (root / name).read_text()


# ---- the repository --------------------------------------------------------------------------------------------------


def test_what_is_committed_is_what_the_rows_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("module", [markdown, pictures, report, stored])
def test_the_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_the_last_row_of_a_case_counts():
    rows = [step("published", 10, 1.0), step("published", 50, 2.0), step("published", 10, 3.0)]
    assert [each["p50_ms"] for each in latest(rows, stored.KINDS["step"])] == ["3.0", "2.0"]


def test_want_of_time_replaces_nothing_that_was_measured():
    measured, left_out = step("published", 10, 1.0), step("published", 10, note="left out: no time left")
    does_not_fit = step("published", 10, note="does not fit: 10 classes …")
    kind = stored.KINDS["step"]
    assert latest([measured, left_out], kind) == [measured]
    assert latest([left_out, measured], kind) == [measured]
    assert latest([measured, does_not_fit], kind) == [does_not_fit]
    assert latest([does_not_fit, left_out], kind) == [left_out]


def test_a_file_of_an_earlier_form_is_not_there(root):
    old = {name: value for name, value in step("published", 10, 1.0).items() if name != "above_floor"}
    assert save(root, "step", old).every("step") == []
    assert read(root / "nowhere.csv", stored.KINDS["step"]) == []


def test_only_what_is_of_one_commit_and_machine_is_compared(root):
    few, many = step("skipkernels", 10, 100.0), step("skipkernels", 21841, 140.0)
    case = {"model": "ViT-B-16", "B": "4", "precision": "fp32"}
    growth = growth_of(save(root, "step", few, many), **case)
    assert growth is not None and growth.time == pytest.approx(1.4)
    assert str(growth) == "1.40 times the time, 1.00 times the memory"
    for other in ({"commit": "def"}, {"threads": 1}, {"torch": "2.14"}):
        assert growth_of(save(root, "step", few, many | {k: str(v) for k, v in other.items()}), **case) is None
    assert growth_of(save(root, "step", few, many | {"p50_ms": ""}), **case) is None
    assert beside([few, many], many, C="10") == few and beside([few, many], many, C="50") is None


def test_rows_are_in_order_of_numbers_precisions_and_names():
    rows = [step("published", 50), step("skipkernels", 500), step("x", 50), step("skipkernels", 50, precision="bf16")]
    found = stored.ordered([*rows, step("skipkernels", 50)], ("skipkernels", "published"), "C precision")
    keys = [(each["C"], each["precision"], each["who"]) for each in found]
    fp32 = [("50", "fp32", who) for who in ("skipkernels", "published", "x")]
    assert keys == [*fp32, ("50", "bf16", "skipkernels"), ("500", "fp32", "skipkernels")]


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_has_no_empty_columns_and_no_cell_that_breaks_it():
    assert markdown.table(["", "a", "b"], [["x", "", "1|2"]]) == "|  | b |\n| --- | --- |\n| x | 1\\|2 |"


def test_a_step_that_can_not_be_run_says_why(root):
    does_not_fit = step("published", 500, note="does not fit: 500 classes keep about 99.0 GiB")
    too_long = step("published", 1000, note="left out: a step takes about 70 s")
    rows = [step("skipkernels", 10, 1268.9), step("published", 10, 3097.2, faster=2.441), does_not_fit, too_long]
    save(root, "step", *rows)
    text = page(root)
    assert "| skipkernels | fp32 | 1,269 |  |  |" in text
    assert "| published | fp32 | 3,097 (2.44) | does not fit | not run: about 70 s |" in text
    assert "keep about 99.0 GiB" in page(root, "docs/benchmarks.md")


def test_three_numbers_at_the_top(root):
    published = step("published", 1000, 9000.0, faster=5.8, saved_mib=1790)
    ours = [step("skipkernels", 10, 1000.0), step("skipkernels", 1000, 1762.0), step("skipkernels", 21841, 1400.0)]
    save(root, "step", *ours, published)
    text = page(root)
    assert "| a step at 1,000 classes, against the published one | 5.80 times faster |" in text
    assert "| 1,790 MiB → 100 MiB |" in text
    assert "| a step at 21,841 classes, of one at 10 | 1.40 times the time, 1.00 times the memory |" in text
    limit = step("published", 21841, "", note="does not fit: 1358 of 21841 classes keep about 19.6 GiB for backward")
    save(root, "step", *ours, published, limit)
    assert "| 1.40 times the time, 1.00 times the memory; the published one does not fit |" in page(root)
    # Measured again without the other: the ratio is still that of the run that had both.
    save(root, "step", *ours, published, step("skipkernels", 1000, 10.0, commit="def", saved_mib=7))
    assert "| 5.80 times faster |" in page(root) and "| 1,790 MiB → 100 MiB |" in page(root)


def test_the_small_line_has_every_commit_and_command(root):
    save(root, "step", step("skipkernels", 10, 1.0), step("skipkernels", 50, 1.0, commit="def"))
    assert f"<sub>{CPU}, 2 threads; torch 2.13; commit abc, def; `python -m bench.step`</sub>" in page(root)


def test_operators_are_held_against_eager_and_the_fastest_other(root):
    rows = [operator("skipkernels"), operator("eager", faster=2, wanted="≥ 1.5"), operator("slow", faster=3)]
    rows += [operator("Liger", faster=0.8), operator("absent", p50_ms=""), operator("eager", faster=1.5, dtype="bf16")]
    save(root, "operators", *rows)
    text = page(root, "docs/operators.md")
    assert "| shape | than eager, fp32 | than eager, bf16 | wanted | than the fastest other, fp32 |" in text
    assert "| `class_scores` | N1 | 2.00 | 1.50 | ≥ 1.5 | **0.80**, Liger |" in text


def test_means_over_seeds(root):
    def run(method: str, seed: int, base: float, **values: object) -> dict[str, str]:
        case = {"data": "glyphs", "method": method, "seed": seed, "trained_parameters": 1536}
        return row("glyphs", **case | {"base": base, "new": 30, "harmonic": 40, "step_ms": 0.5} | values)

    probe = run("linear-probe", 0, 80.0, new="", harmonic="", step_ms="")
    save(root, "glyphs", run("skip", 0, 74.0), run("skip", 1, 76.0), run("skip", 2, 1.0, data="greek"), probe)
    text = page(root)
    assert "| Skip Tuning | 2 | 75.0 ± 1.4 | 30.0 | 40.0 | 0.50 ms | 1,536 |" in text
    assert "| linear probe | 1 | 80.0 | none | none |  | fitted |" in text


def test_what_was_never_measured_says_so(root):
    text = page(root)
    assert "Not measured yet: `python -m bench.step`." in text and "Not drawn yet." in text


# ---- where we lose, and goals ----------------------------------------------------------------------------------------


def test_every_loss_is_told_the_furthest_first(root):
    save(root, "step", step("published", 10, 1.0, faster=0.9), step("skipkernels, memory=min", 10, 1.0, faster=0.5))
    rows = [operator("skipkernels"), operator("eager", "N1", 0.63), operator("Liger", "N1", 0.7)]
    rows += [operator("eager", "N2", 1.5), operator("peer", "N2", p50_ms="", note="needs a GPU")]
    save(root, "operators", *rows)
    store = {"store": "bf16", "N": 197, "W": 768, "B": 4, "loader_gb_s": 40}
    device = save(root, "cache_read", row("cache_read", **store, of_list=0.53))
    lines = re.findall(r"^\| (.*) \| \*\*(.*)\*\* \|$", report.losses(device), re.MULTILINE)
    assert lines == [
        ("the feature cache | reading, bf16, 4 images of 197 × 768 | a list of tensors", "0.53"),
        ("`class_scores` | N1, fp32 | eager", "0.63"),
        ("`class_scores` | N1, fp32 | Liger", "0.70"),
        ("a step | ViT-B-16, batch 4, 10 classes, fp32 | published", "0.90"),
    ]
    assert "faster in 4 of 5 comparisons:" in report.losses(device)
    short = report.losses(device, most=2)
    assert "Liger" not in short and "docs/benchmarks.md#where-we-lose" in short


def test_a_wrong_result_of_ours_is_told(root):
    device = save(
        root, "operators", operator("skipkernels", p50_ms="", note="wrong: by 1"), operator("eager", faster=2)
    )
    assert "- `class_scores`, N1, fp32: wrong: by 1" in report.losses(device)


def test_goals(root):
    wanted = {"wanted": "≥ 1.5"}
    save(root, "operators", operator("eager", "N1", 1.6, **wanted), operator("eager", "N2", 1.2, **wanted))
    steps = [step("skipkernels", 10, 100.0, above_floor=1.61), step("skipkernels", 50, 100.0, above_floor=1.2)]
    device = save(root, "step", *steps, step("skipkernels", 21841, 151.0, above_floor=1.6))
    text = report.goals(device)
    assert "| a step, times its floor: ViT-B-16, batch 4, fp32 | ≤ 1.6 | 1.20 to 1.61 | not at C = 10 |" in text
    assert "ViT-B-16, batch 4, fp32 | ≤ 1.5 | 1.51 times the time, 1.00 times the memory | no |" in text
    assert "| `class_scores`, times faster than eager: 2 shapes, fp32 | ≥ 1.5 | 1.20 to 1.60 | not at N2 |" in text
    gpu = save(root, "step", *(each | {"device": GPU} for each in steps))
    assert "|  | measured |" in report.goals(gpu), "the floors are wanted of CPUs"


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_only_what_stands_between_the_comments_changes(root):
    text = page(root)
    assert text.startswith("before\n<!-- bench:headline -->\n") and text.endswith("<!-- /bench:lose -->\nafter\n")
    assert page(root) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- bench:a --><!-- /bench:a -->" * 2,
        "<!-- bench:a --><!-- /bench:b -->",
        "<!-- bench:b --><!-- /bench:b -->",
    ],
    ids=["no_place", "two_places", "not_closed", "unknown"],
)
def test_a_block_has_one_place(tmp_path, text):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: expected a pair of comments for each of \['a'\]; got "):
        filled(tmp_path / "page.md", {"a": "text"})


def test_check_names_what_is_stale_and_writes_nothing(root, capsys):
    check = ["--root", str(root), "--check"]
    save(root, "step", step("skipkernels", 10, 1.0), step("skipkernels", 50, 2.0))
    report.main(["--root", str(root)])
    assert report.main(check) == 0
    save(root, "step", step("skipkernels", 10, 1.0), step("skipkernels", 50, 3.0))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert report.main(check) == 1
    told = capsys.readouterr().out
    for name in ("README.md", "docs/benchmarks.md", "bench/results/CPU-avx2-/step_over_classes.svg"):
        assert f"{name} is not up to date: python -m bench.report\n" in told
    assert "docs/operators.md" not in told
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    (root / "README.md").write_text(page(root).replace("| 3.00 |", "| 2.00 |"))
    assert report.main(check) == 1 and "README.md" in capsys.readouterr().out, "a number was typed"


def test_a_picture_without_rows_goes(root):
    picture = save(root, "step", step("skipkernels", 10, 1.0)).folder / "step_over_classes.svg"
    page(root)
    assert picture.exists()
    save(root, "step", step("skipkernels", 10, note="does not fit: 10 classes …"))
    page(root)
    assert not picture.exists()


def test_every_device_has_a_section_and_readme_the_gpu_first(root):
    save(root, "step", step("skipkernels", 10, 1.0))
    save(root, "step", step("skipkernels", 10, 2.0, device=GPU))
    other = "Another CPU (avx2)"  # before the first in the alphabet
    save(root, "step", step("skipkernels", 10, 3.0, device=other))
    text, whole = page(root), page(root, "docs/benchmarks.md")
    assert re.findall(r"^\*\*(.*)\*\*$", text.partition("bench:step")[2].partition("/bench")[0], re.M) == [GPU, other]
    assert re.findall(r"^## (.*)$", whole, re.MULTILINE) == [GPU, other, CPU]
    assert re.findall(r"!\[.*\]\((.*)\)", text) == [
        "bench/results/GPU/step_over_classes.svg",
        "bench/results/GPU/memory_over_classes.svg",
    ]
    links = re.findall(r"\]\((\S+\.svg)\)", whole)
    assert len(links) == 6 and all((root / "docs" / link).exists() for link in links)


# ---- pictures --------------------------------------------------------------------------------------------------------

ALONE = [step("skipkernels", C, 10.0 * C, precision) for C in (10, 50, 500) for precision in pictures.PRECISIONS]
DOES_NOT_FIT = [step("published", 10, 30.0), step("published", 50, note="does not fit: …")]
BUDGET = [
    row("profile", step="skipkernels", C=50, K=27, precision="fp32", group=group, p50_ms=ms, share=ms / 100)
    for group, ms in (("matrix products", 80), ("attention", 10), ("our operators", 4), ("the rest", 6))
]
DRAWN = {
    "step": lambda: pictures.step_over_classes(ALONE + DOES_NOT_FIT),
    "memory": lambda: pictures.memory_over_classes(ALONE + DOES_NOT_FIT),
    "budget": lambda: pictures.time_budget(BUDGET),
    "operators": lambda: pictures.operator_speedups([operator("eager", "N1", 0.6), operator("eager", "N2", 3, "bf16")]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_the_same_each_time_and_suits_white_and_black(name):
    svg = DRAWN[name]()
    assert svg == DRAWN[name]() and not re.search(r"\b20\d\d-", svg)
    ElementTree.fromstring(svg)
    colours = set(re.findall(r"(?:fill|stroke): (#\w+)", svg))
    readable = {*plots.COLOURS, plots.GREY}
    assert colours <= readable | {"#ffffff"}, "each has a contrast of at least 3 with white and with black"
    if name != "budget":  # where white stands on bars
        opaque = [part for part in re.findall(r'style="([^"]*)"', svg) if "fill: #ffffff" in part]
        assert all("opacity: 0" in part for part in opaque), "the background is the page's"


def test_who_stops_is_marked():
    assert "does not fit with more" in pictures.step_over_classes(ALONE + DOES_NOT_FIT)
    assert "does not fit with more" not in pictures.step_over_classes(ALONE)
    left_out = [step("published", 10, 30.0), step("published", 50, note="left out: a step takes about 70 s")]
    assert "not run with more" in pictures.step_over_classes(ALONE + left_out)


def test_a_line_that_lacks_later_values_has_no_mark():
    """Steps ran with up to 50 classes, of which one has a peak of memory."""
    ran = [step("published", 10, 30.0) | {"peak_mib": "5"}, step("published", 50, 90.0) | {"peak_mib": ""}]
    rows = [*ALONE, *ran, step("published", 500, note="does not fit: …")]

    def marked(column: str) -> list[float]:
        axes = Figure().subplots()
        pictures._curves(rows, column, "{}", "fp32", axes)
        return [x for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()]

    assert marked("p50_ms") == [50.0] and marked("peak_mib") == []


def test_a_bar_has_its_shares_and_its_sum():
    svg = pictures.time_budget(BUDGET)
    assert all(text in svg for text in ("80 %", "10 %", "6 %", "100 ms", "27 of 50 classes"))
    assert "4 %" not in svg, "there is no room for it"


def test_nothing_to_draw_is_no_picture():
    assert pictures.step_over_classes([]) == pictures.memory_over_classes(DOES_NOT_FIT[1:]) == ""
    assert pictures.time_budget([]) == pictures.operator_speedups([operator("skipkernels")]) == ""


def test_another_matplotlib_may_draw_otherwise_but_not_from_other_rows(root, monkeypatch):
    device = save(root, "step", *ALONE)
    page(root)
    monkeypatch.setattr(report.matplotlib, "__version__", "99.0")
    drawn = {path: text for path, text in Report(root).files().items() if path.name == "step_over_classes.svg"}
    ((path, text),) = drawn.items()
    assert path.read_text() != text and report.up_to_date(path, text)
    save(root, "step", *ALONE, step("published", 10, 1.0))
    assert not report.up_to_date(path, Report(root).files()[path])
    assert device.folder == path.parent
