"""One page with figures for a run, tables for several: report.html."""
