"""gpumesh-node: a provider's machine. Reads top to bottom; nothing is decided here."""

import asyncio
import secrets
from dataclasses import replace

import gpumesh_node
from gpumesh_node import meters
from gpumesh_node.config import NodeSettings
from gpumesh_node.engines.factory import make_engines
from gpumesh_node.hardening import forbid_core_dumps
from gpumesh_node.identity import Enrolment
from gpumesh_node.journal import Journal, JournalError
from gpumesh_node.runner import Runner
from gpumesh_node.session import Session
from gpumesh_runtime.clock import SystemClock
from gpumesh_runtime.lifecycle import Life, StartError, run
from gpumesh_runtime.link import NODE_LINK
from gpumesh_runtime.metrics import REGISTRY


async def serve(life: Life, settings: NodeSettings) -> None:
    """The node from start to the end of its drain."""
    engines = make_engines(settings.engines)
    enrolment = Enrolment(settings, SystemClock())
    identity = await enrolment.identity()
    try:
        journal = Journal(settings.state_dir / "journal")
    except JournalError as err:
        raise StartError(str(err)) from err
    runner = Runner(engines, journal, orphan_s=settings.orphan_s)
    session = Session(
        identity,
        runner,
        journal,
        version=gpumesh_node.__version__,
        boot_id=secrets.token_hex(8),
        options=replace(
            NODE_LINK,
            reconnect_min_s=settings.reconnect_min_s,
            reconnect_max_s=max(settings.reconnect_min_s, settings.reconnect_max_s),
        ),
        server_name=settings.scheduler_server_name,
        on_change=lambda up: life.health.set("session", "" if up else "no scheduler answers"),
    )
    life.health.set("session", "no scheduler answers")
    REGISTRY.before_scrape(lambda: meters.RECEIPTS.set(len(journal)))
    for engine in engines:
        engine.on_change = session.tell
    working = [life.spawn(engine.run(), f"engine {engine.name}") for engine in engines]
    life.spawn(enrolment.keep_renewed(lambda: session.reauthenticate(settings.drain_s)), "certificate renewal")
    life.spawn(session.run(), "session")
    life.ready(node_id=identity.node_id)
    try:
        await life.until_stopped()
        await session.drain(settings.drain_s)
        await session.stop()
    finally:
        await runner.close()
        for work in working:
            work.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        await journal.sync()
        journal.close()


def main() -> None:
    """Entry point of `gpumesh-node`."""
    settings = NodeSettings.load()
    forbid_core_dumps()
    run(lambda life: serve(life, settings), settings, "node")


if __name__ == "__main__":
    main()
