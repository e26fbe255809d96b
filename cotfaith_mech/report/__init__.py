"""RUN/report.html: the whole run as one page that works offline."""

from .build import build_report

__all__ = ["build_report"]
