"""The edge's composition root."""

import functools

from gpumesh_edge_http.config import EdgeSettings
from gpumesh_edge_http.edge import Edge
from gpumesh_runtime.lifecycle import Life, StartError, run


async def serve(settings: EdgeSettings, life: Life) -> None:
    """One edge, from start to drain."""
    edge = Edge(settings, settings.tls(), life.health)
    try:
        await edge.start()
    except OSError as err:
        raise StartError(f"cannot listen on {settings.host}:{settings.port}: {err.strerror}") from err
    life.ready(port=edge.server.port)
    await life.until_stopped()
    await edge.drain(settings.drain_s)
    await edge.stop()


def main() -> None:
    """Entry point."""
    settings = EdgeSettings.load()
    run(functools.partial(serve, settings), settings, "edge-http")


if __name__ == "__main__":
    main()
