"""report.html: self-contained pages of the results of a run or a study, from the templates in `templates`."""

from .from_folder import run_report
from .run_page import report_html
from .study_page import study_html

__all__ = ["report_html", "run_report", "study_html"]
