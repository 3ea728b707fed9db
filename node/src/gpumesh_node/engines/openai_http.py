"""Any OpenAI-compatible HTTP server as an engine: vLLM, Ollama, llama.cpp server, TGI, SGLang, LM Studio.

One keep-alive pool per engine. Whatever the socket holds when the loop turns becomes one read(), so a burst of the engine is one frame.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import aiohttp
import msgspec

from gpumesh_node.domain.failures import EngineFailure, broken, from_status
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_node.domain.normalise import Normaliser
from gpumesh_node.domain.request import EngineBody, EngineRequest
from gpumesh_node.engines.base import Answer, OnChange
from gpumesh_node.engines.choices import SplitAnswer
from gpumesh_node.engines.http_answer import HttpAnswer
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.reasons import Reason

log = get_logger("gpumesh.node.engine")
_LOOK_EVERY_S: Final = 10.0  # how often a well engine's /v1/models is read again
_LOOK_SOON_S: Final = 1.0  # and one that does not answer
_LOOK_TIMEOUT_S: Final = 5.0
_TIMED_OUT: Final = "no answer in time"
_MAX_ERROR_BYTES: Final = 64 * 1024
_HEADERS: Final = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
# Connections that one job may hold; llamacpp_child has a thread for each.
MAX_SPLIT: Final = 16
_READ_BYTES: Final = 64 * 1024  # unread answer per job before the socket is left alone


@dataclass(frozen=True, slots=True)
class HttpEngineSettings:
    """How to reach an engine and what it is.

    base_url: up to and with "/v1". models: name at the engine -> model as the mesh knows it. api_key: bearer token, empty for none.
    always_stream: ask for a stream even when the client did not, and merge: for engines that notice a closed connection only while
    they write. split_choices: send n requests of one choice each. keepalive_s: shorter than the engine's own, or requests meet closing
    connections.
    """

    name: str
    base_url: str
    models: dict[str, ServedModel]
    api_key: str = ""
    always_stream: bool = False
    split_choices: bool = False
    keepalive_s: float = 4.0
    connect_s: float = 5.0

    def __repr__(self) -> str:
        return f"HttpEngineSettings(name={self.name!r}, base_url={self.base_url!r})"


class _ModelCard(msgspec.Struct):
    id: str = ""
    # vLLM's and SGLang's.
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard] | None = None


_MODEL_LIST: Final = msgspec.json.Decoder(_ModelList)


def _nothing() -> None:
    """Nobody listens yet."""


class OpenAiHttpEngine:
    """An OpenAI-compatible server. See base.Engine."""

    def __init__(self, settings: HttpEngineSettings) -> None:
        self.name = settings.name
        self.on_change: OnChange = _nothing
        self._settings = settings
        self._base_url = settings.base_url.rstrip("/")
        self._served = dict(settings.models)
        self._engine_names = {model.model_id: name for name, model in settings.models.items()}
        self._session: aiohttp.ClientSession | None = None
        self._was_well: bool | None = None
        self._look_now = asyncio.Event()
        self._running = 0

    def models(self) -> Sequence[ServedModel]:
        """Its models with the state of the last look."""
        return tuple(self._served.values())

    # --- life -----------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps looking at /v1/models until cancelled."""
        await self.open()
        try:
            while True:
                self._look_now.clear()
                well = await self.look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_S if well else _LOOK_SOON_S):
                        await self._look_now.wait()
        finally:
            await self.close()

    async def open(self) -> None:
        """Makes the connection pool. It has no limit of its own: slots bound the connections."""
        headers = dict(_HEADERS)
        if self._settings.api_key:
            headers["Authorization"] = f"Bearer {self._settings.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self._settings.keepalive_s, ttl_dns_cache=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_s),
            headers=headers,
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_READ_BYTES,
        )

    async def close(self) -> None:
        """Closes the pool."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def move_to(self, base_url: str) -> None:
        """The engine has a new address (a child process that was started again)."""
        self._base_url = base_url.rstrip("/")

    def set_all(self, state: ModelState) -> None:
        """Sets all models' state and tells the node when that changes something."""
        self._update({name: model.with_state(state) for name, model in self._served.items()})

    async def look(self) -> bool:
        """Asks the engine which models it has and updates states. Returns whether all of ours are there."""
        found, reason = await self._discover()
        if reason == _TIMED_OUT and self._running:
            # Busy, not gone: llama.cpp's server has a thread for each connection, and all may wait for slow readers.
            return bool(self._was_well)
        served = {name: _seen(model, found.get(name)) for name, model in self._served.items()}
        missing = [name for name, model in served.items() if model.state is not ModelState.READY]
        well = not missing
        if well is not self._was_well:
            self._was_well = well
            if well:
                log.info("engine answers", engine=self.name, count=len(served))
            else:
                log.warning(
                    "engine does not serve all models",
                    engine=self.name,
                    missing=missing,
                    reason=reason or "not in its list",
                )
        self._update(served)
        return well

    async def _discover(self) -> tuple[dict[str, _ModelCard], str]:
        """The engine's own list by name, and why it is empty."""
        assert self._session is not None
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S), self._session.get(f"{self._base_url}/models") as response:
                body = await response.read()
                if response.status != 200:
                    return {}, f"HTTP {response.status}"
                return {card.id: card for card in _MODEL_LIST.decode(body).data or ()}, ""
        except TimeoutError:
            return {}, _TIMED_OUT
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, UnicodeDecodeError) as err:
            return {}, type(err).__name__

    def _update(self, served: dict[str, ServedModel]) -> None:
        changed = served != self._served
        self._served = served
        if changed:
            self.on_change()

    # --- answers --------------------------------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> Answer:
        """Begins one answer. Raises EngineFailure."""
        body = EngineBody(request.payload)
        choices, seed = body.choices, body.integer("seed")
        if choices == 1 or not self._settings.split_choices:
            return await self._begin(request, body, choices, seed)
        if choices > MAX_SPLIT:
            message = f"This model makes at most {MAX_SPLIT} choices of one request."
            raise EngineFailure(
                Reason.INVALID_ARGUMENT, message, retryable=False, metadata={"param": "n", "limit": str(MAX_SPLIT)}
            )
        body.set("n", 1)
        parts: list[asyncio.Task[Answer]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for choice in range(choices):
                    # The same seed would give the same answer n times.
                    own = None if seed is None else seed + choice
                    if own is not None:
                        body.set("seed", own)
                    parts.append(group.create_task(self._begin(request, body.copy(), 1, own)))
        except BaseExceptionGroup as failures:
            for part in parts:
                if part.done() and not part.cancelled() and part.exception() is None:
                    part.result().abort()
            raise failures.exceptions[0] from None
        whole = not request.streaming
        return SplitAnswer([part.result() for part in parts], seed, whole=whole)

    async def _begin(self, request: EngineRequest, body: EngineBody, choices: int, seed: int | None) -> Answer:
        streamed = request.streaming or self._settings.always_stream
        name = self._engine_names[request.model_id]
        top_logprobs = body.integer("top_logprobs") or 0
        if body.flag("logprobs") and top_logprobs == 0:
            # llama.cpp gives 20 alternatives when the number is absent; one is the least that every engine takes.
            body.set("top_logprobs", 1)
        data = body.write(name, body.cap(request.max_output_tokens), streaming=streamed)
        response = await self._post(data, request.traceparent)
        if response.status != 200:
            raise from_status(response.status, await _error_body(response))
        # A server that does not stream answers whole, whatever was asked.
        streamed = response.content_type == "text/event-stream"
        self._running += 1
        return HttpAnswer(
            response,
            Normaliser(choices, top_logprobs),
            streamed=streamed,
            merging=not request.streaming,
            seed=seed,
            on_end=self._on_end,
        )

    def _on_end(self) -> None:
        self._running -= 1

    async def _post(self, data: bytes, traceparent: str) -> aiohttp.ClientResponse:
        session = self._session
        if session is None:
            raise EngineFailure(Reason.ENGINE_UNAVAILABLE, "The engine is not running.", retryable=True)
        headers = {"traceparent": traceparent} if traceparent else None
        url = f"{self._base_url}/chat/completions"
        for last in (False, True):
            try:
                return await session.post(url, data=data, headers=headers, allow_redirects=False)
            except (aiohttp.ClientConnectorError, TimeoutError):
                # Nobody is there: no more offers until a look finds it again.
                self.set_all(ModelState.FAILED)
                self._look_now.set()
                break
            except (aiohttp.ClientError, OSError):
                # The engine closed an idle connection in the moment it was used: nothing was answered, once more is safe.
                if last:
                    break
        raise broken("The engine cannot be reached.")


def _seen(model: ServedModel, card: _ModelCard | None) -> ServedModel:
    """A model after a look: ready when the engine lists it, with the context that the engine tells unless one is configured."""
    if card is None:
        return model.with_state(ModelState.FAILED)
    if card.max_model_len and not model.context_tokens:
        model = replace(model, context_tokens=card.max_model_len)
    return model.with_state(ModelState.READY)


async def _error_body(response: aiohttp.ClientResponse) -> bytes:
    """The start of an error answer; empty when it does not come."""
    try:
        async with asyncio.timeout(_LOOK_TIMEOUT_S):
            return await response.content.read(_MAX_ERROR_BYTES)
    except (aiohttp.ClientError, OSError, TimeoutError):
        return b""
    finally:
        response.release()
