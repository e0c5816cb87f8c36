"""Studies: which runs are started, skipped and resumed, and their tables."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.report.study_page import tables
from skipkernels.app.results.study import MeanAndDeviation
from skipkernels.app.studies import runs
from skipkernels.app.studies.compare import compare, study_of, write_study
from skipkernels.app.studies.rates import MULTIPLIERS, SEED
from skipkernels.app.studies.runs import run_variants
from tests.app.runs import fails
from tests.processes import forkserver

QUIET = Console(quiet=True)
TINY = TuneConfig(method="skip", shots=2, max_classes=6, epochs=1, device="cpu")


def two(**changes) -> dict[str, TuneConfig]:
    changed = dataclasses.replace(TINY, **changes)
    return {"a": changed, "b": dataclasses.replace(changed, decay=0.5)}


def test_run_variants_alternates_variants(ran, tmp_path):
    results = run_variants(two(), range(2), tmp_path, QUIET)
    assert [(result.variant, result.seed) for result in results] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [(config.seed, config.decay) for config in ran] == [(0, 0.3), (0, 0.5), (1, 0.3), (1, 0.5)]
    assert [config.out for config in ran] == [tmp_path / "runs" / name for name in ("a-0", "b-0", "a-1", "b-1")]
    assert not any(config.resume or config.overwrite for config in ran)


def test_run_variants_skips_complete_and_resumes_interrupted(ran, tmp_path):
    first = run_variants(two(), range(2), tmp_path, QUIET)
    (tmp_path / "runs" / "b-0" / "metrics.json").unlink()
    del ran[:]
    again = run_variants(two(), range(2), tmp_path, QUIET)
    assert [(config.out.name, config.resume) for config in ran] == [("b-0", tmp_path / "runs" / "b-0")]
    assert [result for result in again if (result.variant, result.seed) != ("b", 0)] == [first[0], *first[2:]]
    del ran[:]
    run_variants(two(), range(2), tmp_path, QUIET, overwrite=True)
    assert len(ran) == 4 and all(config.overwrite and not config.resume for config in ran)


def test_run_variants_other_settings_in_folder(ran, tmp_path):
    run_variants(two(), range(1), tmp_path, QUIET)
    with pytest.raises(InputError, match="shots is 2 in the run in .*a-0, and 3 here; .* .run: a.$"):
        run_variants(two(shots=3), range(1), tmp_path, QUIET)


def test_compare_tables_and_json(ran, tmp_path):
    study = compare(TINY, ["skip", "zero-shot"], range(2), tmp_path, QUIET)
    assert [config.method for config in ran] == ["skip", "zero-shot"] * 2
    summary = study.summary
    assert summary["skip"]["accuracy, %"]["base"] == MeanAndDeviation.of([10.0, 30.0])
    assert summary["zero-shot"]["accuracy, %"]["base"] == MeanAndDeviation.of([20.0, 40.0])
    assert summary["skip"]["accuracy, %"]["new"] is None and summary["skip"]["cost"]["step, ms"] is None
    paths = write_study(study, tmp_path)
    assert [path.name for path in paths] == ["compare.json", "report.html"]
    written = json.loads(paths[0].read_text())
    assert written["seeds"] == [0, 1] and len(written["runs"]) == 4
    assert written["summary"]["skip"]["accuracy, %"]["base"] == [20.0, 200**0.5]
    accuracies, costs = (table.in_terminal() for table in tables(study))
    assert list(accuracies.columns[1].cells) == ["20.0", "30.0"], "two seeds are too few for an interval"
    assert list(accuracies.columns[2].cells) == ["–", "–"] and list(costs.columns[4].cells) == ["100", "100"]


# Accuracies on validation images by method and factor of the rates, 70 % for other factors; lora diverges from 1 on.
FOUND = {"skip": {1.0: 80.0, 3.0: 80.0}, "full": {3.0: 90.0}, "lora": {}}


@pytest.mark.parametrize("measure", ["accuracy", "balanced accuracy"])
def test_compare_searches_rates_of_every_method_on_own_data(ran, own, tmp_path, monkeypatch, measure):
    """The best factor of each is chosen, of equal ones the first."""
    own = dataclasses.replace(own, class_weight="balanced" if measure == "balanced accuracy" else None)
    recipes = {method: own.with_method(method).resolved() for method in FOUND}
    complete = runs._in_subprocess

    def measured(config):
        metrics = complete(config)
        if config.seed != SEED:
            return metrics
        factor = round(config.text_lr / recipes[config.method].text_lr, 3)
        if config.method == "lora" and factor >= 1:
            raise FloatingPointError
        accuracy = FOUND[config.method].get(factor, 70.0)
        plain, balanced = (accuracy, 5.0) if measure == "accuracy" else (5.0, accuracy)
        held_out = {"images": 4, "zero_shot": 5.0, "tuned": plain}
        return metrics | {"validation": held_out, "by_class": {"validation": {"balanced_accuracy": balanced}}}

    monkeypatch.setattr(runs, "_in_subprocess", measured)
    study = compare(own, ["auto", *FOUND, "zero-shot"], range(1), tmp_path / "out", QUIET)
    tried = [config.method for config in ran if config.seed == SEED]
    assert sorted(tried) == sorted([*FOUND] * len(MULTIPLIERS))
    searched = {run["variant"]: run["metrics"]["search"] for run in study.runs}
    assert {method: searched[method]["multiplier"] for method in FOUND} == {"skip": 1.0, "full": 3.0, "lora": 0.3}
    assert searched["auto"] is None and searched["zero-shot"] is None
    reported = next(config for config in ran if config.method == "full" and config.seed == 0)
    assert (reported.text_lr, reported.image_lr) == (3 * recipes["full"].text_lr, 3 * recipes["full"].image_lr)
    columns = study.summary["full"]["search of the rates"]
    assert columns["seconds"].mean == searched["full"]["seconds"] > 0 and columns[measure].mean == 90.0


@pytest.mark.parametrize("changes", [{"text_lr": 1e-3}, {"validation": "none"}])
def test_compare_without_search(ran, own, tmp_path, changes):
    compare(dataclasses.replace(own, **changes), ["skip", "full"], range(1), tmp_path / "out", QUIET)
    assert [config.seed for config in ran] == [0, 0]


def test_run_variants_shows_progress(ran, tmp_path, capsys):
    console = Console(width=200, force_terminal=False, stderr=True)
    run_variants(two(), range(2), tmp_path, console)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 of 4  a, seed 0"
    assert lines[1].startswith("a, seed 0: base 10.0 %, 0:00:0") and lines[2] == "2 of 4  b, seed 0"
    run_variants(two(), range(2), tmp_path, console)
    assert capsys.readouterr().err == f"4 of 4 runs are complete in {tmp_path}\n"


def test_compare_ignores_settings_of_other_methods(ran, tmp_path):
    compare(dataclasses.replace(TINY, skip_layers=2), ["skip", "full", "zero-shot"], range(1), tmp_path, QUIET)
    assert [config.skip_layers for config in ran] == [2, 0.5, 0.5]


def test_write_study_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("skipkernels.app.studies.compare.study_html", lambda study: "")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file can't be written"):
        write_study(study_of("t", "", [], {}, None), tmp_path / "file")


@pytest.mark.parametrize("option", ["--seed", "--resume", "--method"])
def test_compare_has_no_option_for_settings_of_the_runs(option, capsys):
    with pytest.raises(SystemExit):
        main(["compare", option, "1"])
    assert f"Unrecognized options: {option}" in capsys.readouterr().err


def test_an_error_of_a_run_names_its_variant(monkeypatch, tmp_path):
    """Also an error in the process of the run. One of the tests' server has imported PyTorch."""
    context = forkserver()
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda method: context)
    missing = dataclasses.replace(TINY, model=f"local-dir:{tmp_path / 'none'}")
    with pytest.raises(InputError, match=r"none: no folder .*none\. .run: a.$"):
        run_variants({"a": missing}, [0], tmp_path, QUIET)
    wrong = dataclasses.replace(TINY, method="linear-probe")
    with pytest.raises(InputError, match="epochs: 1 has no effect with `method=linear-probe`; leave it out. .run: b.$"):
        run_variants({"a": missing, "b": wrong}, [0], tmp_path, QUIET)  # before the first run


def test_compare_command(tmp_path, capsys, in_process):
    arguments = "compare --methods zero-shot linear-probe --seeds 1 --shots 2 --max-classes 6 --device cpu".split()
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "linear probe" in capsys.readouterr().out
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["summary"]["linear-probe"]["accuracy, %"]["new"] is None
    zero_shot = found["summary"]["zero-shot"]["accuracy, %"]["new"]
    assert zero_shot == [found["runs"][1]["metrics"]["zero_shot"]["new"], None]
    assert (tmp_path / "runs" / "zero-shot-0" / "report.html").exists()
    page = (tmp_path / "report.html").read_text()
    assert "skipkernels compare --shots 2 --max-classes 6 --device cpu" in page
    assert "--methods zero-shot linear-probe --seeds 1" in page
    assert main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("{}", "title: Field required")])
def test_report_of_a_damaged_comparison(tmp_path, capsys, text, reason):
    (tmp_path / "compare.json").write_text(text)
    assert f"compare.json: damaged, or of another version ({reason}" in fails(["report", tmp_path], capsys)
