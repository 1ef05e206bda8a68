"""What unit tests of several files share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_drawings(monkeypatch):
    """Reports without their figures: to draw those takes as long as a whole small run.

    For files that run simulations by the dozen and look at something else. The figures have tests of
    their own (test_report_page.py), and whole reports are written in tests/e2e.
    """
    from markupsafe import Markup

    from fedcore.report import page

    def drawn(title, draw, caption, legend, label, salt=""):
        svg = Markup("<svg></svg>")
        return {
            "title": title, "wide": svg, "narrow": svg, "caption": caption, "legend": legend, "label": label,
        }  # fmt: skip

    monkeypatch.setattr(page, "drawn", drawn)
