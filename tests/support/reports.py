"""Runs whose report nobody opens."""

from __future__ import annotations

import contextlib

import pytest


@contextlib.contextmanager
def no_reports():
    """Runs that end inside leave their folder without a report: to draw its figures takes as long as a small
    run. Whole reports are written where commands run as processes, and in tests/unit/report."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fedcore.report.write", lambda directory: None)
        yield
