"""Pages about training runs: one HTML file each, which needs no network and runs no script."""
from gpucnn.report.comparison import write_comparison
from gpucnn.report.pictures import require_pillow
from gpucnn.report.records import RunRecord, read_record
from gpucnn.report.run_page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "RunRecord", "read_record", "require_pillow", "write_comparison",
           "write_report"]
