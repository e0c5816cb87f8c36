"""Page of a study: its sentence and tables."""

from __future__ import annotations

from skipkernels.app.report.study_page import study_html
from skipkernels.app.results.study import MeanAndDeviation, Study
from tests.app.report.pages import ENVIRONMENT, NASTY
from tests.app.report.parsed import Page


def study() -> Study:
    def method(accuracy, seconds):
        cost = {"tuning, s": MeanAndDeviation(*seconds), "peak, MiB": MeanAndDeviation(100.0, 0.0)}
        return {"accuracy, %": {"base": MeanAndDeviation(*accuracy), "new": None}, "cost": cost}

    summary = {"skip": method([80.0, 1.0], [9.0, 1.0]), NASTY: method([60.0, None], [1.0, 0.1])}
    return Study(
        title=f"pictogram-tiny {NASTY}",
        seeds=[0, 1, 2],
        summary=summary | {"bad": method([50.0, 0.5], [5.0, 0.1])},
        command="skipkernels compare",
        comparison=None,
        runs=[{"metrics": {"images": {"tests": {}}}}],
        threads=1,
        **ENVIRONMENT,
    )


def test_study_page_of_methods():
    text = study_html(study())
    found = Page(text)
    assert "Skip Tuning has the highest accuracy on trained classes, 80.0 ± 2.5 % (3 seeds)." in found.text
    assert ["Skip Tuning", "80.0 ± 2.5", "–"] in found.rows and ["bad", "5.0", "100"] in found.rows
    assert len(list(found.root.iter("script"))) == 1 and NASTY not in text
