"""A running scheduler for each test, with short timers."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.scheduler_mesh import Mesh, running_mesh


@pytest.fixture
async def mesh(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    """`@pytest.mark.parametrize("mesh", [{...}], indirect=True)` changes settings."""
    settings: dict[str, Any] = getattr(request, "param", {})
    async with running_mesh(tmp_path, **settings) as mesh:
        yield mesh
