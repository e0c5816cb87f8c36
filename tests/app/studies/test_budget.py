"""Search within a time budget: which candidates are tried, when it ends, and which run is kept."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from PIL import Image
from rich.console import Console

from skipkernels.app.cli.main import main
from skipkernels.app.data import InputError
from skipkernels.app.studies import budget
from skipkernels.app.studies.budget import Search, seconds_of
from skipkernels.app.studies.runs import OutOfTime, _Deadline

QUIET = Console(quiet=True)


@pytest.mark.parametrize("text", ["", "20", "20 m", "-1m", "0s", "1d", "infs", "nanm"])
def test_seconds_of_bad_time(text):
    with pytest.raises(InputError, match="must be a time above 0 such as 90s, 20m or 1h"):
        seconds_of(text)


@pytest.fixture
def search(own, tmp_path, monkeypatch):
    """Function that searches with faked runs: 10 s each, with an accuracy by name. Returns names, the best and ends."""
    clock, started = [time.time()], []
    monkeypatch.setattr(budget.time, "time", lambda: clock[0])
    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])

    def searched(accuracies, seconds=1000.0, kept=4.0, **changes):
        def execute(planned, *, deadline, **_):
            started.append(planned.name)
            found = accuracies.get(planned.name, 50.0)
            if isinstance(found, OutOfTime):
                clock[0] += 1
                raise found
            clock[0] += 10
            metrics = {"status": "complete", "classes": {"all": 8}, "kept_classes": kept}
            metrics |= {"checkpoint": {"file": "model.safetensors"}, "cost": {"seconds_total": 10.0}}
            planned.config.out.mkdir(parents=True)
            (planned.config.out / "model.safetensors").touch()
            return metrics | {"validation": {"images": 20, "zero_shot": 40.0, "tuned": found}}

        monkeypatch.setattr(budget, "execute", execute)
        monkeypatch.setattr(Search, "_keep", lambda self, best: (best.name, self.sentences))
        del started[:]
        config = dataclasses.replace(own, out=tmp_path / "out", **changes)
        found = Search(config, seconds, QUIET)
        best, sentences = found.run()
        return list(started), best, " ".join(sentences), found

    return searched


def test_search_tries_each_stage_from_the_best(search, tmp_path):
    accuracies = {
        "zero-shot": 40.0,
        "linear-probe": 60.0,
        "skip": 70.0,
        "skip x3": 80.0,
        "skip x3 skip_layers 0.75": 80.0,
    }
    started, best, sentences, found = search(accuracies | {"skip x3 keep_ratio 1": 90.0})
    assert started == [
        "zero-shot", "linear-probe", "skip", "skip x0.3", "skip x3", "skip x0.1", "skip x10",
        "skip x3 skip_layers 0.25", "skip x3 skip_layers 0.75", "skip x3 keep_ratio 1", "skip x3 keep_ratio 0.25",
    ]  # fmt: skip
    assert best == "skip x3 keep_ratio 1" and "All 11 candidates were tried." in sentences
    assert "zero-shot and linear probe are below the interval" in sentences
    weights = [file.parent.name for file in (tmp_path / "out").rglob("model.safetensors")]
    assert weights == ["skip-x3-keep_ratio-1-0"], "only the best keeps its weights"
    rates = {each.name: each.settings["text_lr"] for each in found.tried if each.method == "skip"}
    assert rates["skip x3"] == rates["skip x3 keep_ratio 1"] == pytest.approx(3 * rates["skip"])


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({"text_lr": 1e-3, "keep_ratio": 1.0}, "skip skip_layers 0.75"),
        ({"skip_layers": 2, "keep_ratio": 1.0}, "skip x10"),
        ({"method": "linear-probe"}, "linear-probe"),
    ],
)
def test_search_keeps_given_settings(search, changes, last):
    assert search({}, **changes)[0][-1] == last


def test_search_without_keep_ratio_if_steps_have_all_classes(search):
    assert search({}, kept=8.0)[0][-1] == "skip skip_layers 0.75"


def test_search_ends_before_a_candidate_that_does_not_fit(search):
    started, best, sentences, _ = search({"linear-probe": 60.0, "skip": 60.0}, seconds=35.0)
    assert started == ["zero-shot", "linear-probe", "skip"]
    assert best == "linear-probe", "of equal ones the first"
    assert "skip x0.3, would take about 0:00:10, and 0:00:05 were left" in sentences
    assert "linear-probe has the best accuracy, 60.0 % of 20 validation images; skip reached the same" in sentences


def test_search_says_that_a_baseline_is_within_the_interval(search):
    sentences = search({"zero-shot": 5.0, "linear-probe": 60.0, "skip": 70.0}, 35.0)[2]
    assert "skip has the best accuracy, 70.0 % of 20 validation images (95 % interval 48.1–85.5)" in sentences
    assert "linear-probe (60.0 %) is within this interval" in sentences


def test_search_shortens_a_run_that_is_too_long(search):
    error = OutOfTime()
    error.seconds_per_epoch = 5.0
    started, best, _, found = search({"skip": error, "skip epochs 14": 95.0}, seconds=100.0)
    assert started[2:4] == ["skip", "skip epochs 14"], "14 epochs of 5 s fit into 0.9 of 79 s"
    assert started[4] == "skip epochs 14 x0.3" and best == "skip epochs 14"
    assert [each.status for each in found.tried[2:4]] == ["too long", "complete"]


def test_search_without_a_complete_candidate(search):
    with pytest.raises(InputError, match="no candidate was complete in 0:00:05: The time was over in zero-shot"):
        search({"zero-shot": OutOfTime()}, seconds=5.0)


def test_deadline_ends_a_run_after_an_epoch():
    row = {"seconds": 4.0, "stage_seconds": {"evaluation": 1.0}}
    watch = _Deadline(time.time() + 12, epochs=4)
    watch.write(row | {"epoch": 2})
    with pytest.raises(OutOfTime) as found:
        watch.write(row | {"epoch": 1})
    assert found.value.seconds_per_epoch == 5.0
    _Deadline(time.time() - 1, epochs=4).write(row | {"epoch": 4})


@pytest.fixture
def photos(tmp_path):
    """Folder with ten small images of each of two classes."""
    for name, colour in (("black", 20), ("white", 220)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (32, 32), colour + number).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_time_budget_command(photos, tmp_path, in_process, capsys):
    out = tmp_path / "out"
    arguments = ["tune", "--data", f"imagefolder:{photos}", "--method", "linear-probe", "--time-budget", "10m"]
    arguments += ["--device", "cpu", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "All 2 candidates were tried." in printed and "zero-shot" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    (chosen,) = [row for row in metrics["time_budget"]["candidates"] if row["chosen"]]
    assert chosen["name"] == metrics["method"] and chosen["accuracy"] == metrics["validation"]["tuned"]
    assert "candidates" not in metrics["command"] and "--time-budget 10m" in metrics["time_budget"]["command"]
    page = (out / "report.html").read_text()
    assert "<h2>Search</h2>" in page and page.count("data-copy hidden") == page.count('<div class="command">') == 2
    assert main(["report", str(out)]) == 0 and (out / "report.html").read_text() == page
    assert main(["eval", str(out)]) == 0
    capsys.readouterr()
    assert main(arguments) == 0, "a repeated command continues"
    assert "complete before" in capsys.readouterr().err
    assert main([*arguments[:-4], "--validation", "none"]) == 2
    assert "--time-budget chooses by validation images" in capsys.readouterr().err
