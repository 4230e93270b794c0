"""The page of a run: `report.html` and its figures, rebuilt from a run directory's data alone."""

from aqtx.report.write import write_report

__all__ = ["write_report"]
