"""Reports: methods compared from the records of their runs, as a table, Markdown, JSON and one HTML page."""

from peftdyno.bench.report.comparison import Comparison, compare
from peftdyno.bench.report.pages import write_pages

__all__ = ["Comparison", "compare", "write_pages"]
