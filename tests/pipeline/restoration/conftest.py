"""What the tests of restoration share."""

from pathlib import Path

import pytest
from tests.pipeline.restoration.checkpoints import Three


@pytest.fixture
def three(tmp_path: Path) -> Three:
    """Three full models of one architecture."""
    return Three(tmp_path)
