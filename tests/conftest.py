"""What every test gets: uvloop, a check for leaked tasks, and on demand a real PostgreSQL. Warnings are errors (pyproject.toml)."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import pytest
import uvloop

from tests.support.mesh_fixtures import http, mock_mesh, tiny_mesh
from tests.support.postgres import PostgresServer

__all__ = ["http", "mock_mesh", "tiny_mesh"]  # fixtures, found here by pytest

_LEAK_GRACE_S = 1.0


def pytest_configure(config: pytest.Config) -> None:
    """A loop that stands in the main thread for the whole run: looptime asks for one around sync tests too and would leave it unclosed."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    config.add_cleanup(loop.close)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, as in production; tests in virtual time (looptime) need the standard loop."""
    if item.get_closest_marker("looptime") is not None:
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def _task_watch() -> AsyncIterator[None]:
    """Fails the test when tasks are left after it and after all its fixtures."""
    before = asyncio.all_tasks()
    yield
    end = asyncio.get_running_loop().time() + _LEAK_GRACE_S
    while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if asyncio.get_running_loop().time() >= end:
            names = sorted(f"{task.get_name()}: {task.get_coro()}" for task in left if task is not None)
            pytest.fail(f"{len(left)} task(s) leaked: {names}")
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _no_leaked_tasks(request: pytest.FixtureRequest) -> None:
    """First fixture of every async test, so that it is torn down last."""
    function = getattr(request.node, "obj", None)
    if function is not None and inspect.iscoroutinefunction(inspect.unwrap(function)):
        request.getfixturevalue("_task_watch")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole run, fast and forgetful. For kill tests make a PostgresServer(durable=True) of your own."""
    server = PostgresServer()
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.fixture
def postgres_dsn(postgres_server: PostgresServer) -> Iterator[str]:
    """The address of an empty database of the test's own, dropped afterwards."""
    name = postgres_server.next_database()
    postgres_server.psql(f"create database {name}")
    yield postgres_server.dsn(name)
    postgres_server.psql(f"drop database {name} with (force)")
