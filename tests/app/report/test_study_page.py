"""Page of a study: its sentence, tables and plots."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib.figure
import pytest

from skipkernels.app.report import plots
from skipkernels.app.report.plots import TimedAccuracy, pareto
from skipkernels.app.report.study_page import study_html
from tests.app.report.pages import ENVIRONMENT, NASTY, Page, svgs


def study() -> dict:
    def method(accuracy, seconds):
        return {
            "accuracy, %": {"base": accuracy, "new": None},
            "cost": {"tuning, s": seconds, "peak, MiB": [100.0, 0.0]},
        }

    summary = {"skip": method([80.0, 1.0], [9.0, 1.0]), NASTY: method([60.0, None], [1.0, 0.1])}
    return {
        "title": f"pictogram-tiny {NASTY}",
        "seeds": [0, 1, 2],
        "summary": summary | {"bad": method([50.0, 0.5], [5.0, 0.1])},
        "command": "skipkernels compare",
        "comparison": None,
        "runs": [{"metrics": {"images": {"tests": {}}}}],
        **ENVIRONMENT,
    }


@pytest.mark.parametrize(("values", "limits"), [((60.0, 100.0), (58.0, 100.0)), ((0.0, 40.0), (0.0, 42.0))])
def test_axis_of_accuracies_is_within_per_cent(values, limits):
    axes = matplotlib.figure.Figure().subplots()
    axes.plot((0, 1), values)
    plots.within_per_cent(axes)
    assert axes.get_ylim() == pytest.approx(limits)
    assert not any(line.get_clip_on() for line in axes.lines)


def test_study_page_of_methods():
    text = study_html(study())
    found = Page(text)
    assert (
        "The highest accuracy on trained classes is that of Skip Tuning, 80.0 ± 2.5 %, after 9.0 s of tuning (3 seeds)."
        in found.text
    )
    assert ["Skip Tuning", "80.0 ± 2.5", "–"] in found.rows and ["bad", "5.0", "100"] in found.rows
    assert len(found.named("script")) == 1 and NASTY not in text
    assert [svg.get("aria-label") for svg in map(ElementTree.fromstring, svgs(text))][0].startswith(
        "base accuracy over"
    )
    tied = study()
    tied["summary"]["bad"]["accuracy, %"]["base"] = [80.04, 0.5]
    assert (
        "The highest accuracy on trained classes is that of Skip Tuning and bad, 80.0 % (3 seeds)."
        in Page(study_html(tied)).text
    )
    points = {"a": (1.0, 5.0), "b": (1.0, 6.0), "c": (2.0, 6.0)}
    assert pareto({name: TimedAccuracy(*point, half=0.0) for name, point in points.items()}) == ["b"]
