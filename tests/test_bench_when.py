"""bench.when: tasks, one short run, and its tables."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from bench.when import runs, summary, tasks
from bench.when.rows import Rows, reported
from skipkernels.app.data import InputError

BY_NAME = {shift.name: shift for shift in tasks.SHIFTS}
SMALL = replace(BY_NAME["both"], classes=3, shots=2)
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@pytest.mark.parametrize("shift", [shift for shift in tasks.SHIFTS if shift.blocks], ids=lambda shift: shift.name)
def test_characters_of_search_and_report_are_disjoint_and_enough(shift):
    search, report = (tasks.characters(shift, phase) for phase in ("search", "report"))
    assert not set(search) & set(report)
    assert min(len(search), len(report)) >= 2 * shift.classes


def test_load_draws_other_classes_and_images_for_other_seeds():
    first, again, other = (tasks.load(SMALL, "report", seed, lambda image: image, FONT) for seed in (0, 0, 1))
    assert [test.name for test in first.tests] == ["base", "new"]
    assert not set(first.tests[0].classes) & set(first.tests[1].classes)
    assert first.tests[0].classes == again.tests[0].classes != other.tests[0].classes
    assert (len(first.train), len(first.tests[0].images)) == (6, 30)
    assert first.train[0][0].tobytes() == again.train[0][0].tobytes() != first.tests[0].images[0][0].tobytes()


def test_emoji_without_font_says_what_to_install(tmp_path):
    with pytest.raises(InputError, match=r"fonts-noto-color-emoji.*--emoji-font"):
        tasks.load(BY_NAME["emoji"], "search", 0, lambda image: image, tmp_path / "missing.ttf")


def test_run_trains_and_blends(monkeypatch):
    monkeypatch.setitem(runs.SCHEDULES, "adamw", (1, 4))
    run = runs.Run(SMALL, "lora", runs.Candidate("adamw", 1e-2, 1e-2), "report", 0)
    kept = {}
    original = runs._blended_weights

    def watched(method):
        weights = list(original(method))
        kept.setdefault("calls", []).append({name: weight.clone() for name, weight in weights})
        kept["now"] = dict(weights)
        return iter(weights)

    monkeypatch.setattr(runs, "_blended_weights", watched)
    tuned, blended = runs.execute(run)
    assert (tuned["method"], tuned["blended"], blended["blended"], tuned["steps"]) == ("lora", 0, 1, 2)
    assert 0 <= tuned["base"] <= 100 and tuned["zero_shot_base"] == blended["zero_shot_base"]
    before, after = kept["calls"]
    assert all(name.endswith(".up") and not weight.any() for name, weight in before.items())
    assert any(weight.any() for weight in after.values())
    for name, weight in kept["now"].items():
        torch.testing.assert_close(weight, after[name] / 2)


def row(method, seed, harmonic, blended=0, phase="report", setting="adamw 0.001 0.001", task="both"):
    accuracies = {"base": harmonic, "new": harmonic, "harmonic": harmonic}
    accuracies |= {f"zero_shot_{name}": 30.0 for name in ("base", "new", "harmonic")}
    named = {"task": task, "method": method, "phase": phase, "seed": seed, "setting": setting, "blended": blended}
    return {name: str(value) for name, value in (named | accuracies).items()}


def rows(found):
    new = Rows(save=False)
    new.runs = found
    return new


def test_best_setting_is_that_of_the_search():
    names = [candidate.name for candidate in runs.CANDIDATES["full"]]
    found = [row("full", 10, 10.0 * n, phase="search", setting=name) for n, name in enumerate(names)]
    found += [
        row("full", 10, 99.0, blended=1, phase="search", setting=names[0]),
        row("full", 0, 98.0, setting=names[1]),
    ]
    assert rows(found).best(BY_NAME["both"], "full").name == names[-1]
    assert rows(found).best(BY_NAME["16 shots"], "full").name == names[-1]


def test_reported_runs_have_every_omega():
    found = rows([row(m, 10, 1.0, phase="search", setting=c.name) for m, of in runs.CANDIDATES.items() for c in of])
    planned = list(reported(BY_NAME["both"], 0, FONT, found))
    assert [run.name for run in planned] == summary.METHODS
    assert [run.config().skip_layers for run in planned[:3]] == [0.25, 0.5, 0.75]


def test_tables_show_means_and_paired_differences():
    means = {"skip 2/4": (50.0, 60.0, 70.0), "full": (49.0, 59.0, 69.0), "clip-adapter": (40.0, 40.0, 40.0)}
    found = [row(method, seed, value) for method, of in means.items() for seed, value in enumerate(of)]
    found += [row("skip 2/4", seed, 65.0, blended=1) for seed in range(3)]
    _, lines = summary.accuracy_table(found, "harmonic")
    cells = {line[0]: line[1] for line in lines}
    assert cells["Skip Tuning, ω = ½"] == "60.0 ± 24.8" and cells["zero-shot"] == "30.0 ± 0.0"
    assert cells["Skip Tuning, ω = ½, blended"] == "**65.0 ± 0.0**" and cells["CoOp"] == ""
    _, lines = summary.difference_table(found)
    assert ["Skip Tuning, ω = ½ − full fine-tuning", "+1.0 ± 0.0"] in lines
    assert ["CoOp", ""] in summary.settings_table(found)[1]
    assert ["full fine-tuning", "adamw 0.001 0.001"] in summary.settings_table(found)[1]
    cost = [{"task": "both", "method": "full", "steps": "9", "train_s": "2.5", "train_mib": "30"}]
    assert summary.cost_table(cost) == (["", "steps on both", "both"], [["full fine-tuning", "9", "2.5 s, 30 MiB"]])
