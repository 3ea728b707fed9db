"""The scheduler's RPCs: each hands its stream to a link or asks the desk."""

from collections.abc import Callable
from typing import Any

from gpumesh.scheduler.v1.capacity_service_pb2_grpc import CapacityServiceServicer
from gpumesh.scheduler.v1.dispatch_service_pb2 import DispatchWelcome
from gpumesh.scheduler.v1.dispatch_service_pb2_grpc import DispatchServiceServicer
from gpumesh.scheduler.v1.operator_service_pb2 import DrainRequest, DrainResponse, ListNodesRequest, ListNodesResponse
from gpumesh.scheduler.v1.operator_service_pb2_grpc import OperatorServiceServicer
from gpumesh.scheduler.v1.session_service_pb2_grpc import SessionServiceServicer
from gpumesh_runtime.error_types import Unavailable
from gpumesh_runtime.identity import Identity, peer_certificate_pem
from gpumesh_runtime.link import LinkOptions, serve_link
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.callers import Caller
from gpumesh_scheduler.capacity import Watchers
from gpumesh_scheduler.certificate_end import certificate_end
from gpumesh_scheduler.desk import Desk
from gpumesh_scheduler.nodes import NodeLink, Nodes
from gpumesh_scheduler.wire import summary_to_wire

# grpc.aio's types are generic over an iterator and a context that our links use in their own way.
_Any = Any


class SessionServicer(SessionServiceServicer):
    """Nodes."""

    def __init__(self, nodes: Nodes, options: LinkOptions) -> None:
        self._nodes = nodes
        self._options = options

    async def Connect(self, request_iterator: _Any, context: _Any) -> None:  # type: ignore[override]  # writes through the context
        """One node's session."""
        node = NodeLink(self._nodes, certificate_end(peer_certificate_pem(context)))
        await serve_link(request_iterator, context, receiver=node, welcome=node.welcome, options=self._options)


class DispatchServicer(DispatchServiceServicer):
    """Callers."""

    def __init__(self, desk: Desk, options: LinkOptions) -> None:
        self._desk = desk
        self._options = options
        self._welcome = DispatchWelcome(
            scheduler_id=desk.scheduler_id, scheduler_boot_id=desk.boot_id
        ).SerializeToString()

    async def Connect(self, request_iterator: _Any, context: _Any) -> None:  # type: ignore[override]  # writes through the context
        """One caller's link."""
        caller = Caller(self._desk)
        await serve_link(request_iterator, context, receiver=caller, welcome=self._greet, options=self._options)

    def _greet(self, body: bytes, peer: Identity) -> bytes:
        del body, peer
        if self._desk.board.draining:
            raise Unavailable(Reason.DRAINING, "The scheduler is shutting down.", retryable=True)
        return self._welcome


class CapacityServicer(CapacityServiceServicer):
    """Routers."""

    def __init__(self, watchers: Watchers, options: LinkOptions) -> None:
        self._watchers = watchers
        self._options = options

    async def WatchCapacity(self, request_iterator: _Any, context: _Any) -> None:  # type: ignore[override]  # writes through the context
        """One router's link."""
        watchers = self._watchers
        await serve_link(request_iterator, context, receiver=watchers, welcome=watchers.welcome, options=self._options)


class OperatorServicer(OperatorServiceServicer):
    """People. begin_drain: what SIGTERM does."""

    def __init__(self, desk: Desk, nodes: Nodes, begin_drain: Callable[[], None]) -> None:
        self._desk = desk
        self._nodes = nodes
        self._begin_drain = begin_drain

    async def ListNodes(self, request: ListNodesRequest, context: _Any) -> ListNodesResponse:
        """Sessions by node id."""
        now, board = self._desk.time(), self._desk.board
        links = sorted(self._nodes.links.values(), key=lambda node: node.session.node_id)
        wanted = request.provider_id
        return ListNodesResponse(
            nodes=[
                summary_to_wire(n.session, n.status, now)
                for n in links
                if not wanted or n.session.provider_id == wanted
            ],
            queued_jobs=sum(board.queued(key) for key in board.queue.models()),
        )

    async def Drain(self, request: DrainRequest, context: _Any) -> DrainResponse:
        """Begins the drain."""
        jobs = len(self._desk.board.jobs)
        self._begin_drain()
        return DrainResponse(jobs=jobs)
