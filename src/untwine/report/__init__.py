"""Reports: one self-contained page, or plain numbers, from finished or running run directories.

The report reads only what is on disk. It never needs the model, and it works while the run is
still going.
"""

from untwine.report.numbers import report_numbers
from untwine.report.page import build_report
from untwine.report.run_data import RunData, load_run

__all__ = ["RunData", "build_report", "load_run", "report_numbers"]
