"""`skipkernels report`."""

from __future__ import annotations

import dataclasses

from skipkernels.app.console import Terminal

from .options import Run


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Make report.html again, of a run of tune or compare, from the files in its folder. Needs no data and no model."""

    run: Run
    """Folder of a run, or of a comparison."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Write the page, and print its path. Returns 0."""
        from skipkernels.app.config import CONFIG
        from skipkernels.app.data.files import expanded
        from skipkernels.app.results.files import REPORT, existing_run, writing
        from skipkernels.folders import replace_text

        run = expanded(self.run)
        if run.is_dir() and not (run / CONFIG).is_file():
            from skipkernels.app.report.study_page import study_report

            page = study_report(run)
        else:
            existing_run(run, "report")
            from skipkernels.app.report.run_page import run_report

            page = run_report(run)
        path = run / REPORT
        with writing(path, "run", "report"):
            replace_text(path, page)
        out.print(str(path), soft_wrap=True)
        return 0
