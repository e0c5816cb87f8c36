"""report.html: self-contained pages of the results of a run or a comparison, from the templates in `templates`."""
