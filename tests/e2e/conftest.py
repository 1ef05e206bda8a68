"""What several files of end-to-end tests share."""

from __future__ import annotations

import pytest
from fedcore_server.folding import FoldPool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """One process that folds, for the federations of `town`."""
    with FoldPool(1, tmp_path_factory.mktemp("fold")) as found:
        yield found
