"""An edge between scripted peers, and clients for it."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.edge_peers import EdgeMesh


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[EdgeMesh]:
    """A fresh edge with its peers."""
    async with EdgeMesh(tmp_path) as made:
        yield made


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session
