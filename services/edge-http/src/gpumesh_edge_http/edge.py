"""The edge put together: dispatcher, routes and listener. Used by the process and by tests, which run several in one loop."""

from gpumesh.router.v1.admission_service_pb2 import Catalogue
from gpumesh_dispatch.admit import LinkAdmitter
from gpumesh_dispatch.caller import Dispatcher
from gpumesh_dispatch.models import Models
from gpumesh_dispatch.tokens import TokenCounter
from gpumesh_edge_http.app import App
from gpumesh_edge_http.config import EdgeSettings
from gpumesh_edge_http.measures import CONNECTIONS, HEAD_TIMEOUTS, WRITE_STALLS
from gpumesh_edge_http.routers import Routers
from gpumesh_edge_http.throttle import FailureThrottle
from gpumesh_edge_http.transport import EdgeServer
from gpumesh_runtime.health import Health
from gpumesh_runtime.metrics import REGISTRY
from gpumesh_runtime.tls import TlsIdentity


class Edge:
    """One edge. start(), then drain() and stop()."""

    def __init__(self, settings: EdgeSettings, tls: TlsIdentity | None, health: Health) -> None:
        self._settings = settings
        self._health = health
        self.models = Models()
        self.admitter = LinkAdmitter(
            settings.router_addresses, tls, settings.edge_id, on_catalogue=self._on_catalogue, on_change=self._on_change
        )
        self.dispatcher = Dispatcher(self.admitter, tls, settings.edge_id, max_jobs=settings.max_jobs)
        self._routers = Routers(settings.router_addresses, tls)
        self._tokens = TokenCounter(self._routers.fetch)
        throttle = FailureThrottle(settings.auth_failures_burst, settings.auth_failures_per_s)
        limits = settings.limits()
        self.app = App(
            self.dispatcher,
            self.models,
            self._tokens,
            self._routers.authenticate,
            throttle,
            health,
            limits,
            deadline_s=settings.deadline_s,
        )
        self.server = EdgeServer(self.app.handle, self.app.malformed, limits)
        REGISTRY.before_scrape(self._fill_gauges)
        self._on_change()

    async def start(self) -> None:
        """Connects and listens. Raises OSError when the address cannot be bound."""
        self.dispatcher.start()
        self.admitter.start()
        self.app.start()
        await self.server.start(self._settings.host, self._settings.port, self._settings.http_tls())

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new connections, lets requests finish and their records be settled; False when time ran out."""
        self.server.close_listener()
        return await self.dispatcher.drain(timeout_s)

    async def stop(self) -> None:
        """Ends what still runs, closes everything."""
        await self.dispatcher.stop()
        await self.server.stop(1.0)
        self.app.stop()
        await self.admitter.stop()
        self._tokens.close()
        await self._routers.close()

    def _on_catalogue(self, catalogue: Catalogue) -> None:
        self.models.replace(catalogue)
        self._on_change()

    def _on_change(self) -> None:
        problem = ""
        if not self.admitter.ready:
            problem = "no router is connected"
        elif not self.models.known:
            problem = "the catalogue has not arrived"
        self._health.set("router", problem)

    def _fill_gauges(self) -> None:
        CONNECTIONS.set(self.server.connections)
        HEAD_TIMEOUTS.set(self.server.head_timeouts)
        WRITE_STALLS.set(self.server.write_stalls)
