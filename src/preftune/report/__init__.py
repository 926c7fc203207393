"""Run folders to one HTML page: what was run, what it reached, and what the models now say.

The page is one file that needs no network: plotly.js stands in it once, and a content security
policy forbids everything that would leave the file. Only run folders are read; nothing is trained
or measured here.
"""

from preftune.report.page import write_report

__all__ = ["write_report"]
