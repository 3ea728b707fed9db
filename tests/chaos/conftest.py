"""One more mesh for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.support.mesh import Mesh

SLOTS = 64  # per node, two nodes
STALL_S = 6


@pytest.fixture(scope="session")
def wide_mesh() -> Iterator[Mesh]:
    """mock-model with many slots, and an edge that cuts readers after 6 s of standstill instead of 30."""
    mesh = Mesh.start(
        *("--engine", "mock", "--nodes", "2", "--slots", str(SLOTS)),
        env={"GPUMESH_EDGE_HTTP_WRITE_STALL_S": str(STALL_S)},
    )
    try:
        yield mesh
    finally:
        mesh.stop()
