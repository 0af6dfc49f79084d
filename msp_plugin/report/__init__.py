"""The report: one self-contained HTML file, drawn from a run's records or from a comparison."""

from msp_plugin.report.section import Section
from msp_plugin.report.write import write_report

__all__ = ["Section", "write_report"]
