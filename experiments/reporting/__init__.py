"""Tables and figures from the records. Imports no torch."""

from __future__ import annotations


class ReportError(ValueError):
    """An error that the user can fix; its message says how."""
