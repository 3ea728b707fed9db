"""Certificates for links."""

import pytest

from tests.support.link_server import Certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One CA for a module."""
    return Certificates(tmp_path_factory.mktemp("ca"))
