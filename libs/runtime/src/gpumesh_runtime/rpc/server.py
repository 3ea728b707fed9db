"""The one way to serve RPCs: TLS always, every method checked against its `access` option, errors mapped, health,
graceful stop.

    server = Server("router", settings.internal_address, settings.tls())
    server.add(admission, add_AdmissionServiceServicer_to_server)
    await server.start()
    ...
    await server.stop(grace_s=10)

What stands around a method, outermost first: error mapping, authorisation, deadline (unary only). It is wrapped around the
handler when the servicer is added, not an interceptor: an interceptor costs each RPC a coroutine, and a wrapped stream handler
costs a long stream nothing per message.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf import descriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gpumesh_runtime.access import method_path, roles_of, service_named
from gpumesh_runtime.error_types import InvalidArgument, PermissionDenied
from gpumesh_runtime.errors import abort
from gpumesh_runtime.identity import Role, peer_identity
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.metrics import counter
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.rpc.options import server_options
from gpumesh_runtime.tls import TlsIdentity

log = get_logger("gpumesh.rpc")
_FAILED: Final = counter(
    "gpumesh_rpc_failed_total", "RPCs that ended in an error, by method and reason", ("method", "reason")
)
# grpc.aio stops serving when its server object is garbage-collected: whoever is started stays here until it is stopped.
_RUNNING: Final[set["Server"]] = set()

Context = Any  # grpc.aio.ServicerContext is generic over messages that this module does not know


class AddressInUseError(Exception):
    """A listener could not be bound. The text names the address and is meant for a person."""


class Server:
    """A gRPC listener.

    name: for logs. address: "host:port", port 0 takes a free one (see `port`). tls: this process's certificate.
    public: server TLS only and no client certificate; only methods whose access is ROLE_PUBLIC can be called.
    Otherwise mTLS is required.
    """

    def __init__(
        self,
        name: str,
        address: str,
        tls: TlsIdentity,
        *,
        public: bool = False,
        development: bool = False,
        options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        self.name = name
        self.address = address
        self.port = 0
        self._public = public
        self._development = development
        self._tls = tls
        # The first of two options of one name counts.
        self._server = grpc.aio.server(options=[*(options or []), *server_options()])
        self._services: list[str] = []
        self._health = health.aio.HealthServicer()

    def add(self, servicer: Any, add_fn: Callable[[Any, Any], None]) -> "Server":
        """Adds a servicer with its generated `add_XServicer_to_server`. Raises MissingAccessError when an RPC has no
        access option.
        """
        captured = _Captured()
        add_fn(servicer, captured)
        for name, handlers in captured.services.items():
            service = service_named(name)
            wrapped = {method.name: self._guard(method, handlers[method.name]) for method in service.methods}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, wrapped),))
            self._services.append(name)
        return self

    async def start(self) -> None:
        """Binds and serves. Raises AddressInUseError."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in self._services:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self._development:
            # Imported here: reflection loads every descriptor and is not wanted in production.
            from grpc_reflection.v1alpha import reflection  # noqa: PLC0415 -- see above

            reflection.enable_server_reflection([*self._services, reflection.SERVICE_NAME], self._server)
        credentials = self._tls.server_credentials(require_client_certificate=not self._public)
        try:
            self.port = self._server.add_secure_port(self.address, credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            await self._server.stop(None)
            raise AddressInUseError(
                f"cannot listen on {self.address}: the port is taken or the address is not this machine's"
            )
        _RUNNING.add(self)
        await self._server.start()
        log.info(
            "serving",
            address=self.address,
            port=self.port,
            mode="public" if self._public else "mtls",
            services=self._services,
        )

    async def drain(self) -> None:
        """Tells health checkers that this process is going; RPCs are still served."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Takes no new RPCs, lets running ones finish for `grace_s` seconds, then cancels them."""
        await self.drain()
        try:
            await self._server.stop(grace_s)
        finally:
            _RUNNING.discard(self)

    def _guard(self, method: descriptor.MethodDescriptor, handler: "grpc.RpcMethodHandler[Any, Any]") -> Any:
        """The handler with everything that stands around it."""
        allowed = roles_of(method)
        inner: Any
        make: Any
        if handler.request_streaming and handler.response_streaming:
            inner, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
        elif handler.request_streaming:
            inner, make = handler.stream_unary, grpc.stream_unary_rpc_method_handler
        elif handler.response_streaming:
            inner, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            inner, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        unary = not handler.request_streaming and not handler.response_streaming
        check = _Check(method_path(method), frozenset({Role.PUBLIC}) if self._public else None, allowed, unary)
        outer = (
            _around_generator(inner, check) if inspect.isasyncgenfunction(inner) else _around_coroutine(inner, check)
        )
        return make(outer, handler.request_deserializer, _serializer(handler.response_serializer))


def _serializer(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """As generated, but bytes pass: a link writes messages that it encoded itself, and would else parse and encode each again."""
    if serialize is None:
        return None

    def encode(message: Any) -> bytes:
        return message if type(message) is bytes else serialize(message)

    return encode


class _Captured:
    """Stands in for a server while a generated add function runs, to get at its handlers."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same handlers as below, without their names."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """What we want."""
        self.services[service] = handlers


class _Check:
    """Whether this caller may call this method on this listener."""

    __slots__ = ("_allowed", "_listener", "_unary", "path")

    def __init__(self, path: str, listener: frozenset[Role] | None, allowed: frozenset[Role], unary: bool) -> None:
        self.path = path
        # A method is reachable on a public listener only when anyone may call it at all.
        self._allowed = allowed if listener is None else allowed & listener
        self._listener = listener
        self._unary = unary

    def __call__(self, context: Context) -> None:
        """Raises PermissionDenied, Unauthenticated or InvalidArgument (DEADLINE_REQUIRED)."""
        role = Role.PUBLIC if self._listener else peer_identity(context).role
        if role not in self._allowed and Role.PUBLIC not in self._allowed:
            raise PermissionDenied(Reason.PERMISSION_DENIED, f"A caller of role {role.name} may not call {self.path}.")
        if self._unary and context.time_remaining() is None:
            raise InvalidArgument(Reason.DEADLINE_REQUIRED, f"{self.path} needs a deadline: set a timeout on the call.")


async def _fail(context: Context, check: _Check, err: Exception) -> None:
    """Ends the RPC with the status of `err`. An abort that the handler made itself passes through."""
    if isinstance(err, grpc.aio.AbortError):
        raise err
    reason = getattr(err, "reason", Reason.INTERNAL)
    _FAILED.labels(check.path, str(reason)).add(1)
    await abort(context, err)


def _around_coroutine(
    inner: Callable[[Any, Context], Awaitable[Any]], check: _Check
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        try:
            check(context)
            return await inner(request, context)
        except asyncio.CancelledError:
            raise  # grpc.aio leaks the call when a servicer swallows it
        except Exception as err:
            await _fail(context, check, err)

    return call


def _around_generator(
    inner: Callable[[Any, Context], AsyncIterator[Any]], check: _Check
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            check(context)
            async for message in inner(request, context):
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as err:
            await _fail(context, check, err)

    return call
