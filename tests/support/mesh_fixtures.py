"""Fixtures of whole meshes, one of each kind per test run: starting one takes seconds."""

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.support.mesh import Mesh


@pytest.fixture(scope="session")
def tiny_mesh() -> Iterator[Mesh]:
    """A mesh as `make up` starts it: the shipped model on llama.cpp, one node. Tests leave it as they found it."""
    mesh = Mesh.start()
    try:
        yield mesh
    finally:
        mesh.stop()


@pytest.fixture(scope="session")
def mock_mesh() -> Iterator[Mesh]:
    """A mesh with two nodes whose engine is mock-model, for scripted faults. Tests leave it as they found it."""
    mesh = Mesh.start("--engine", "mock", "--nodes", "2")
    try:
        yield mesh
    finally:
        mesh.stop()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client without a limit on connections."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield session
