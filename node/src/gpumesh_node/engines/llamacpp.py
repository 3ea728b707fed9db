"""The built-in engine: llama.cpp in a child process of its own, started again when it dies, reached over loopback HTTP.

A C++ abort takes only the child: its jobs fail retryable, because their connections break, and the model is FAILED until the child is back.
"""

import asyncio
import os
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from gpumesh_node import meters
from gpumesh_node.child import Child
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_node.domain.request import EngineRequest
from gpumesh_node.engines.base import Answer, OnChange
from gpumesh_node.engines.llamacpp_child import ChildReady, ChildSettings
from gpumesh_node.engines.openai_http import HttpEngineSettings, OpenAiHttpEngine
from gpumesh_runtime.logs import get_logger

log = get_logger("gpumesh.node.llamacpp")
_LOAD_S: Final = 600.0  # a model of many gigabytes from a slow disk
_LOOK_EVERY_S: Final = 5.0
_LOOKS_MISSED: Final = 3  # a server that answers none of them in a row hangs, and is killed
_BACKOFF_FIRST_S: Final = 0.25
_BACKOFF_MOST_S: Final = 30.0
_STEADY_S: Final = 60.0  # a child that lived so long starts the back-off anew
_STOP_S: Final = 5.0
_LAST_LINES: Final = 8


@dataclass(frozen=True, slots=True)
class LlamaCppSettings:
    """One GGUF file. path: of the file. threads: CPU threads that compute. gpu_layers: how many layers go to a GPU."""

    name: str
    path: str
    model: ServedModel
    threads: int = 1
    gpu_layers: int = 0


class LlamaCppEngine:
    """llama.cpp with one model. See base.Engine."""

    def __init__(self, settings: LlamaCppSettings) -> None:
        self.name = settings.name
        self.pid = 0  # of the child, 0 while there is none
        self._settings = settings
        self._api_key = secrets.token_urlsafe(24)
        self._http = OpenAiHttpEngine(
            HttpEngineSettings(
                name=settings.name,
                base_url="http://127.0.0.1:0/v1",
                models={settings.model.model_id: settings.model},
                api_key=self._api_key,
                # It notices a closed connection within 10 ms while it streams, and within 1 s while it does not.
                always_stream=True,
                # Its usage counts one choice of n only, and n is bounded by its slots.
                split_choices=True,
            )
        )
        self._errors: deque[str] = deque(maxlen=_LAST_LINES)
        self._loading = True

    @property
    def on_change(self) -> OnChange:
        """Called when its model's state changes."""
        return self._http.on_change

    @on_change.setter
    def on_change(self, callback: OnChange) -> None:
        self._http.on_change = callback

    def models(self) -> Sequence[ServedModel]:
        """Its one model."""
        return self._http.models()

    async def generate(self, request: EngineRequest) -> Answer:
        """Begins one answer. Raises EngineFailure."""
        return await self._http.generate(request)

    async def run(self) -> None:
        """Keeps a child running until cancelled; ends it then."""
        loop = asyncio.get_running_loop()
        backoff = _BACKOFF_FIRST_S
        await self._http.open()
        try:
            while True:
                began = loop.time()
                await self._one_child()
                self._http.set_all(ModelState.FAILED)
                backoff = _BACKOFF_FIRST_S if loop.time() - began > _STEADY_S else min(2 * backoff, _BACKOFF_MOST_S)
                await asyncio.sleep(backoff)
        finally:
            await self._http.close()

    async def _one_child(self) -> None:
        """One child from start to end. Failures are logged, not raised."""
        meters.ENGINE_STARTS.labels(self.name).add()
        self._loading = True
        self._errors.clear()
        child = await Child.start("gpumesh_node.engines.llamacpp_child")
        self.pid = child.pid
        errors = asyncio.create_task(self._read_errors(child.stderr), name="llamacpp-stderr")
        try:
            ready = await self._ready(child)
            if ready.address:
                self._loading = False
                log.info("engine started", engine=self.name, pid=child.pid, address=ready.address)
                self._http.move_to(f"{ready.address}/v1")
                await self._watch(child)
            else:
                log.error("engine did not start", engine=self.name, error=ready.error, cause=" | ".join(self._errors))
        finally:
            self.pid = 0
            await _end(child)
            errors.cancel()
            await asyncio.gather(errors, return_exceptions=True)
            child.close()
        log.warning("engine process ended", engine=self.name, exit_code=child.exit_code)

    async def _ready(self, child: Child) -> ChildReady:
        settings = self._settings
        told = ChildSettings(
            path=settings.path,
            alias=settings.model.model_id,
            slots=settings.model.slots,
            context_tokens=settings.model.context_tokens,
            threads=settings.threads,
            api_key=self._api_key,
            parent=os.getpid(),
            gpu_layers=settings.gpu_layers,
        )
        try:
            async with asyncio.timeout(_LOAD_S):
                child.write(msgspec.json.encode(told) + b"\n")
                line = await child.stdout.readline()
        except TimeoutError:
            return ChildReady(error=f"the model was not loaded within {_LOAD_S:g} s")
        except (OSError, ValueError):
            return ChildReady(error="the process ended while it started")
        if not line:
            return ChildReady(error="the process ended while it loaded the model")
        return msgspec.json.decode(line, type=ChildReady)

    async def _watch(self, child: Child) -> None:
        """Until the child ends, or hangs."""
        ended = asyncio.ensure_future(child.wait())
        missed = 0
        try:
            while not ended.done() and missed < _LOOKS_MISSED:
                missed = 0 if await self._http.look() else missed + 1
                await asyncio.wait({ended}, timeout=_LOOK_EVERY_S)
        finally:
            ended.cancel()

    async def _read_errors(self, stream: asyncio.StreamReader) -> None:
        """Keeps the last lines from before it serves, for the log; what comes later is read and dropped: it could quote a prompt."""
        while line := await _line(stream):
            if self._loading:
                self._errors.append(line.decode(errors="replace").strip()[:300])


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # a line longer than the buffer: the buffer is emptied
        return b"..."


async def _end(child: Child) -> None:
    """Ends a child: stdin's end asks it to, SIGKILL makes it."""
    child.close_stdin()
    try:
        async with asyncio.timeout(_STOP_S):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
