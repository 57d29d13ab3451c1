from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora of `tiny`, for the recipes of a module."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_corpora(folder)
    return folder
