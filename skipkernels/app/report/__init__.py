"""report.html: self-contained pages of the results of a run or a study, from the templates in `templates`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_names

if TYPE_CHECKING:
    from .run_page import report_html, run_report

__all__ = ["report_html", "run_report"]

__getattr__ = lazy_names(__name__, {"run_page": ("report_html", "run_report")})
