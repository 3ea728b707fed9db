"""The routes: one short function per route, from an exchange to an answer. Decides nothing but what HTTP asks for."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import unquote

from gpumesh_dispatch.api_key import ApiKey
from gpumesh_dispatch.caller import Dispatcher
from gpumesh_dispatch.models import Models
from gpumesh_dispatch.prepare import prepare_chat
from gpumesh_dispatch.request import JobRequest
from gpumesh_dispatch.tokens import TokenCounter
from gpumesh_edge_http.auth import key_from_header
from gpumesh_edge_http.catalogue import ShownModels
from gpumesh_edge_http.exchange import ClientGoneError, Exchange
from gpumesh_edge_http.limits import Limits
from gpumesh_edge_http.measures import THROTTLED, count
from gpumesh_edge_http.problems import UNAUTHENTICATED
from gpumesh_edge_http.respond import json_answer, problem_answer, text_answer
from gpumesh_edge_http.sinks import ChatSink, StreamSink, WholeSink
from gpumesh_edge_http.throttle import FailureThrottle
from gpumesh_runtime.errors import (
    InvalidArgument,
    MeshError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unauthenticated,
    Unimplemented,
    as_mesh_error,
)
from gpumesh_runtime.health import Health
from gpumesh_runtime.link import new_id
from gpumesh_runtime.metrics import REGISTRY
from gpumesh_runtime.tracing import sample, span

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MODELS: Final = "/v1/models"
_CHAT: Final = "/v1/chat/completions"


class App:
    """All that the routes need. handle() is the server's handler."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        models: Models,
        tokens: TokenCounter,
        authenticate: Callable[[ApiKey], Awaitable[None]],
        throttle: FailureThrottle,
        health: Health,
        limits: Limits,
        *,
        deadline_s: float,
    ) -> None:
        self.sinks: set[ChatSink] = set()
        self._dispatcher = dispatcher
        self._models = models
        self._shown = ShownModels(models)
        self._tokens = tokens
        self._authenticate = authenticate
        self._throttle = throttle
        self._health = health
        self._limits = limits
        self._deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to send comments on streams that wait."""
        self._timer = self._loop.call_later(1.0, self.start)
        now = self._loop.time()
        for sink in tuple(self.sinks):
            sink.keep_alive(now, self._limits.keep_alive_comment_s)

    def stop(self) -> None:
        """Ends the timer."""
        if self._timer is not None:
            self._timer.cancel()

    async def handle(self, exchange: Exchange) -> None:
        """One request, from head to log line. Raises nothing but CancelledError."""
        began = time.perf_counter()  # the loop's own clock has steps of 1 ms
        job_id = new_id()
        given = exchange.headers.get("X-Request-Id")
        request_id = given if given is not None and _usable(given) else f"req_{job_id.hex()}"
        path, _, _ = exchange.path.partition("?")
        route, reason, sink = "other", "", None
        try:
            if path == _CHAT:
                route = "chat"
                _need(exchange, "POST")
                sink = await self._chat(exchange, job_id, request_id)
                await sink.finished
            else:
                route = await self._other(exchange, path, request_id)
        except MeshError as err:
            reason = self._refuse(exchange, request_id, err)
        except ClientGoneError:
            reason = Reason.CLIENT_GONE.value
        except asyncio.CancelledError:
            reason = Reason.CLIENT_GONE.value
            if sink is not None:
                sink.client_gone()
            raise
        except Exception as err:  # noqa: BLE001, RUF100 -- a bug of ours costs one request, logged by as_mesh_error
            reason = self._refuse(exchange, request_id, as_mesh_error(err))
        finally:
            if sink is not None:
                self.sinks.discard(sink)
                reason = self._ended(exchange, sink)
            count(exchange, route, request_id, began, time.perf_counter(), sink, reason)
            if sink is not None:
                sink.detach()

    def malformed(self, exchange: Exchange, kind: str) -> None:
        """What the parser could not read."""
        too_long = kind == "LineTooLong"
        text = "The request's head is too long." if too_long else "The request is not well-formed HTTP/1.1."
        problem_answer(exchange, f"req_{new_id().hex()}", InvalidArgument(Reason.INVALID_ARGUMENT, text))

    def _refuse(self, exchange: Exchange, request_id: str, err: MeshError) -> str:
        if err.reason in UNAUTHENTICATED:
            self._throttle.failed(exchange.remote, self._loop.time())
        if exchange.method not in ("GET", "HEAD") and exchange.bytes_in == 0:
            exchange.keep_alive = False  # the body was not read
        if not exchange.started:
            problem_answer(exchange, request_id, err)
        return err.reason.value

    # --- chat -----------------------------------------------------------------------------------------------------------

    def _ended(self, exchange: Exchange, sink: ChatSink) -> str:
        """Takes note of whether the key was good; returns the reason of a failure, else ""."""
        error, running = sink.error, sink.running
        if running is not None:
            if sink.admission is not None:
                self._throttle.admitted(running.request.key_sha256)
            elif error is not None and error.reason in UNAUTHENTICATED:
                self._throttle.refused(running.request.key_sha256)
                self._throttle.failed(exchange.remote, self._loop.time())
        if sink.span is not None:
            sink.span.set("http.response.status_code", exchange.status or 499)
            if sink.admission is not None:
                sink.span.set("gen_ai.request.model", sink.admission.model_id)
            if sink.completed is not None:
                sink.span.set("gen_ai.usage.input_tokens", sink.completed.usage.prompt_tokens)
                sink.span.set("gen_ai.usage.output_tokens", sink.completed.usage.completion_tokens)
            if error is not None:
                sink.span.fail(error.reason.value)
            sink.span.end()
        if sink.completed is not None:
            return ""
        return error.reason.value if error is not None else Reason.CLIENT_GONE.value

    async def _chat(self, exchange: Exchange, job_id: bytes, request_id: str) -> ChatSink:
        """Validates and starts a job; the sink does the rest. Raises MeshError."""
        key = self._key(exchange)
        content_type = exchange.headers.get("Content-Type", "")
        if not content_type.lower().startswith("application/json"):
            raise _unsupported(content_type)
        if "Content-Encoding" in exchange.headers:
            text = "Compressed request bodies are not read. Send the JSON as it is."
            raise InvalidArgument(Reason.UNSUPPORTED_MEDIA_TYPE, text)
        prepared = await prepare_chat(await exchange.read_body(), self._models, self._tokens)
        chat, size = prepared.chat, prepared.size
        traceparent = sample()
        trace = span("chat", traceparent, {"gen_ai.operation.name": "chat"}, root=True) if traceparent else None
        request = JobRequest(
            job_id=job_id,
            key_id=key.key_id,
            key_sha256=key.sha256,
            model=chat.request.model,
            payload=chat.body,
            streaming=chat.stream,
            features=chat.features,
            input_tokens=size.estimate,
            input_tokens_bound=size.bound,
            max_output_tokens=chat.max_output_tokens,
            choices=chat.choices,
            deadline_s=self._deadline_s,
            traceparent=traceparent,
        )
        with_cost = chat.include_cost or exchange.headers.get("X-Gpumesh-Cost") == "1"
        make = StreamSink if chat.stream else WholeSink
        sink = make(exchange, chat, job_id.hex(), request_id, self._shown, with_cost)
        sink.span = trace
        sink.attach(self._dispatcher.run(request, sink))
        self.sinks.add(sink)
        return sink

    def _key(self, exchange: Exchange) -> ApiKey:
        """The API key. Raises Unauthenticated, or RATE_LIMITED for an address that failed too often."""
        try:
            key = key_from_header(exchange.headers.get("Authorization"))
        except Unauthenticated:
            self._throttled(exchange.remote)
            raise
        if not self._throttle.is_good(key.sha256):
            self._throttled(exchange.remote)
        return key

    def _throttled(self, address: str) -> None:
        wait = self._throttle.blocked_s(address, self._loop.time())
        if wait:
            THROTTLED.value += 1
            text = "Too many requests from this address failed to authenticate. Check the API key and wait."
            raise ResourceExhausted(Reason.RATE_LIMITED, text, retry_after_s=wait)

    # --- the rest -------------------------------------------------------------------------------------------------------

    async def _other(self, exchange: Exchange, path: str, request_id: str) -> str:
        """Answers; returns the route's name. Asks a router only whose a key is that was not admitted here before."""
        if path == "/health":
            _need(exchange, "GET")
            json_answer(exchange, request_id, b'{"status":"ok"}')
            return "probe"
        if path == "/ready":
            _need(exchange, "GET")
            self._ready(exchange, request_id)
            return "probe"
        if path == "/metrics":
            _need(exchange, "GET")
            if exchange.remote not in ("127.0.0.1", "::1") or _forwarded(exchange):
                raise NotFound(Reason.NOT_FOUND, "There is nothing here.")
            text_answer(exchange, request_id, REGISTRY.exposition().encode())
            return "probe"
        if path == _MODELS or path.startswith(_MODELS + "/"):
            _need(exchange, "GET")
            key = self._key(exchange)
            if not self._throttle.is_good(key.sha256):
                await self._authenticate(key)
            self._list_models(exchange, unquote(path[len(_MODELS) + 1 :]), request_id)
            return "models"
        raise NotFound(
            Reason.NOT_FOUND,
            f"There is nothing at {exchange.method} {path[:100]}. Chat completions are at POST {_CHAT}.",
        )

    def _list_models(self, exchange: Exchange, name: str, request_id: str) -> None:
        if not self._models.known:
            text = "The catalogue has not arrived yet. Try again in a second."
            raise MeshError.of(Reason.ROUTER_UNAVAILABLE, text, retry_after_s=1.0)
        json_answer(exchange, request_id, self._shown.one_body(name) if name else self._shown.list_body())

    def _ready(self, exchange: Exchange, request_id: str) -> None:
        problems = self._health.problems()
        if not problems:
            json_answer(exchange, request_id, b'{"status":"ready"}')
            return
        names = ", ".join(f'"{name}"' for name in sorted(problems))
        json_answer(exchange, request_id, b'{"status":"not ready","problems":[%b]}' % names.encode(), 503)


def _forwarded(exchange: Exchange) -> bool:
    """Whether a proxy on this machine passes on somebody else's request."""
    return any(name in exchange.headers for name in ("X-Forwarded-For", "Forwarded", "Via"))


def _usable(request_id: str) -> bool:
    """Whether a client's request id may be repeated, also in logs: no key or token that was put there by mistake."""
    return _REQUEST_ID.fullmatch(request_id) is not None and "gm_" not in request_id and "eyJ" not in request_id


def _need(exchange: Exchange, method: str) -> None:
    if exchange.method == method or (exchange.method == "HEAD" and method == "GET"):
        return
    text = f"This address takes {method}, not {exchange.method}."
    raise Unimplemented(Reason.METHOD_NOT_ALLOWED, text, metadata={"allow": method})


def _unsupported(content_type: str) -> MeshError:
    what = "no content type" if not content_type else "another content type"
    return InvalidArgument(
        Reason.UNSUPPORTED_MEDIA_TYPE, f"The request has {what}. Send JSON with 'Content-Type: application/json'."
    )
