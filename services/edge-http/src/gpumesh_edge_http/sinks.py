"""What becomes of a job's frames: a stream of events, or one whole answer. Everything is a synchronous callback from the link's reader."""

import asyncio
import time
from typing import Protocol

from gpumesh.node.v1.session_pb2 import Frame
from gpumesh_dispatch.openai.answer import WholeAnswer
from gpumesh_dispatch.openai.parse import ParsedChat
from gpumesh_dispatch.openai.pieces import AnswerHead
from gpumesh_dispatch.openai.stream import KEEP_ALIVE, StreamRenderer, error_event
from gpumesh_dispatch.request import Admitted, Completed
from gpumesh_dispatch.running import Running
from gpumesh_edge_http.exchange import Exchange
from gpumesh_edge_http.problems import body_of
from gpumesh_edge_http.respond import OK, json_answer, problem_answer, stream_headers
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.tracing import Span


class Fingerprints(Protocol):
    """What the sinks need of the catalogue."""

    def fingerprint(self, model_id: str) -> str:
        """system_fingerprint of a model's current revision, "" when unknown."""


class ChatSink:
    """What both kinds share. span: of a sampled request.

    finished: resolves when the answer is on the transport, or nobody waits for it any more.

    error: why it failed. first_at: when the first content came (performance counter), 0: not yet. completed: what was billed.
    """

    __slots__ = (
        "_fingerprints",
        "admission",
        "chat",
        "completed",
        "error",
        "exchange",
        "finished",
        "first_at",
        "job_id",
        "loop",
        "request_id",
        "running",
        "span",
        "waiting_since",
        "with_cost",
    )

    def __init__(
        self,
        exchange: Exchange,
        chat: ParsedChat,
        job_id: str,
        request_id: str,
        fingerprints: Fingerprints,
        with_cost: bool,
    ) -> None:
        self.exchange = exchange
        self.chat = chat
        self.job_id = job_id
        self.request_id = request_id
        self.with_cost = with_cost
        self.loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = self.loop.create_future()
        self.admission: Admitted | None = None
        self.completed: Completed | None = None
        self.error: MeshError | None = None
        self.running: Running | None = None
        self.span: Span | None = None  # of a sampled request
        self.first_at = 0.0
        self.waiting_since = self.loop.time()
        self._fingerprints = fingerprints

    def detach(self) -> None:
        """The request is over: lets go of the job, which holds this sink. A cycle of 34 objects a request cost 15 % of the CPU in GC."""
        self.running = None
        self.exchange.on_lost = None
        self.exchange.on_writable = None

    def attach(self, running: Running) -> None:
        """The job runs: from now on the connection's end cancels it, and its drain opens the window."""
        self.running = running
        self.exchange.on_lost = self.client_gone
        if self.exchange.lost:
            self.client_gone()

    def client_gone(self) -> None:
        """The connection broke."""
        if self.running is not None:
            self.running.cancel(Reason.CLIENT_TOO_SLOW if self.exchange.stalled else Reason.CLIENT_GONE)
        self.finish()

    def finish(self) -> None:
        """The handler may return."""
        if not self.finished.done():
            self.finished.set_result(None)

    def on_admitted(self, admission: Admitted) -> None:
        """The job may run."""
        self.admission = admission

    def head(self) -> AnswerHead:
        """What the answer repeats. Made with the first frame: the model's name comes with the admission."""
        model_id = self.admission.model_id if self.admission is not None else self.chat.request.model
        return AnswerHead(
            self.job_id,
            int(time.time()),
            model_id,
            self._fingerprints.fingerprint(model_id),
            self.chat.choices,
            self.chat.logprobs,
        )

    def cost(self, completed: Completed) -> int | None:
        """The charge, where it was asked for."""
        return completed.charge_nano_usd if self.with_cost else None

    def keep_alive(self, now: float, every_s: float) -> None:
        """Called each second."""


class WholeSink(ChatSink):
    """Collects an answer and sends it whole."""

    __slots__ = ("_answer",)

    def __init__(
        self,
        exchange: Exchange,
        chat: ParsedChat,
        job_id: str,
        request_id: str,
        fingerprints: Fingerprints,
        with_cost: bool,
    ) -> None:
        super().__init__(exchange, chat, job_id, request_id, fingerprints, with_cost)
        self._answer: WholeAnswer | None = None

    def on_frame(self, frame: Frame, size: int) -> None:
        """More of the answer; it is in memory, which counts as consumed."""
        answer = self._answer
        if answer is None:
            self.first_at = time.perf_counter()
            answer = self._answer = WholeAnswer(self.head())
        running = self.running
        try:
            answer.frame(frame, size)
        except MeshError as err:
            if running is not None:
                running.fail(err)
            return
        if running is not None:
            running.consumed()

    def on_done(self, completed: Completed) -> None:
        """The answer is whole."""
        self.completed = completed
        answer = self._answer or WholeAnswer(self.head())
        json_answer(self.exchange, self.request_id, answer.render(completed.usage, self.cost(completed)))
        self.finish()

    def on_error(self, error: MeshError) -> None:
        """It failed."""
        self.error = error
        problem_answer(self.exchange, self.request_id, error)
        self.finish()


class StreamSink(ChatSink):
    """Sends an answer as it grows. Its head waits for the first event, so that what fails before has a status of its own."""

    __slots__ = ("_renderer",)

    def __init__(
        self,
        exchange: Exchange,
        chat: ParsedChat,
        job_id: str,
        request_id: str,
        fingerprints: Fingerprints,
        with_cost: bool,
    ) -> None:
        super().__init__(exchange, chat, job_id, request_id, fingerprints, with_cost)
        self._renderer: StreamRenderer | None = None

    @property
    def _with_usage(self) -> bool:
        return self.chat.include_usage or self.with_cost

    def attach(self, running: Running) -> None:
        """As ChatSink; a full transport that drains opens the window again."""
        self.exchange.on_writable = running.consumed
        super().attach(running)

    def on_frame(self, frame: Frame, size: int) -> None:
        """More of the answer."""
        del size
        renderer = self._renderer
        exchange = self.exchange
        if renderer is None:
            self.first_at = time.perf_counter()
            renderer = self._renderer = StreamRenderer(self.head(), usage_chunk=self._with_usage)
        data = renderer.frame(frame)
        if data:
            if exchange.started:
                exchange.write(data)
            else:
                exchange.start_stream(OK, stream_headers(self.request_id), data)
        # A window follows the transport's drain, never the arrival of frames: a full transport grants nothing until it has drained.
        if exchange.writable and self.running is not None:
            self.running.consumed()

    def on_done(self, completed: Completed) -> None:
        """The answer is complete."""
        self.completed = completed
        renderer = self._renderer or StreamRenderer(self.head(), usage_chunk=self._with_usage)
        data = renderer.finish(completed.usage if self._with_usage else None, self.cost(completed))
        exchange = self.exchange
        if not exchange.started:
            exchange.start_stream(OK, stream_headers(self.request_id), data)
            data = b""
        exchange.write(data, last=True)
        self.finish()

    def on_error(self, error: MeshError) -> None:
        """It failed: with a status while nothing was sent, else with an error event and no [DONE]."""
        self.error = error
        exchange = self.exchange
        if exchange.started:
            exchange.write(error_event(body_of(error)), last=True)
        else:
            problem_answer(exchange, self.request_id, error)
        self.finish()

    def keep_alive(self, now: float, every_s: float) -> None:
        """A comment when nothing has been sent for so long and no token has come."""
        if self.first_at or now - self.waiting_since < every_s or self.finished.done():
            return
        self.waiting_since = now
        if self.exchange.started:
            self.exchange.write(KEEP_ALIVE)
        else:
            self.exchange.start_stream(OK, stream_headers(self.request_id), KEEP_ALIVE)
