"""RUN/report.html: the whole run as one page that works offline."""

from .build import build_report
from .merged import build_merged

__all__ = ["build_merged", "build_report"]
