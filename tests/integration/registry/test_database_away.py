"""The registry while its database is away: it keeps running, answers retryably, and catches up."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumesh_runtime.errors import MeshError, Unavailable
from tests.integration.registry.test_directory import connected, lookup, new_key, put_model
from tests.support.postgres import PostgresServer
from tests.support.registry import running_registry

pytestmark = pytest.mark.postgres


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that the test may stop."""
    server = PostgresServer()
    try:
        yield server.start()
    finally:
        server.remove()


async def test_lookups_fail_retryably_while_postgresql_is_away_and_go_on_when_it_is_back(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    async with running_registry(own_server.dsn("postgres"), tmp_path) as registry:
        text = await new_key(registry)
        async with connected(registry) as (link, reader):
            await asyncio.to_thread(own_server.stop)
            with pytest.raises(MeshError) as caught:
                await lookup(link, text)
            assert isinstance(caught.value, Unavailable)
            assert caught.value.retryable
            await _until_health(registry.life.health.problems, {"database": "unreachable"})
            await asyncio.to_thread(own_server.start)
            await _until_health(registry.life.health.problems, {})
            assert await lookup(link, text)
            await put_model(registry, "after")
            await reader.until(lambda: reader.models == ["after"], 2)
            assert link.end is None


async def _until_health(problems: object, wanted: dict[str, str]) -> None:
    assert callable(problems)
    async with asyncio.timeout(20):
        while problems() != wanted:
            await asyncio.sleep(0.02)


async def test_a_registry_that_starts_before_its_database_waits_for_it(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    await asyncio.to_thread(own_server.stop)

    async def start_later() -> None:
        await asyncio.sleep(0.1)
        await asyncio.to_thread(own_server.start)

    later = asyncio.create_task(start_later())
    async with running_registry(own_server.dsn("postgres"), tmp_path) as registry:
        assert await new_key(registry)
    await later
