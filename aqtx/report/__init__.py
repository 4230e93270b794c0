"""Pages of runs: `report.html` of one, `compare.html` of several, rebuilt from run directories' data alone."""

from aqtx.report.compare import write_comparison
from aqtx.report.write import write_report

__all__ = ["write_comparison", "write_report"]
