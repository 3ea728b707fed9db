"""Slots of one model, and what belongs to a job while it is on this node."""

import asyncio
from collections import deque

from gpumesh.common.v1.link_pb2 import Item
from gpumesh_node.domain.deltas import Usage
from gpumesh_node.domain.job import Job
from gpumesh_node.domain.models import ServedModel
from gpumesh_node.domain.outbox import Outbox
from gpumesh_node.engines.base import Answer, Engine
from gpumesh_node.meters import ModelMeters


class Desk:
    """One model's slots: who has one and who waits."""

    def __init__(self, engine: Engine, model_id: str) -> None:
        self.engine = engine
        self.model_id = model_id
        self.running = 0
        self.waiting: deque[Running] = deque()
        self.meters = ModelMeters(model_id)

    @property
    def model(self) -> ServedModel | None:
        """The model as its engine describes it now."""
        return next((model for model in self.engine.models() if model.model_id == self.model_id), None)

    @property
    def taken(self) -> int:
        """Jobs that have a slot or wait for one."""
        return self.running + len(self.waiting)


class Running:
    """One accepted job and what belongs to it at run time."""

    __slots__ = ("answer", "desk", "final", "has_slot", "job", "model", "outbox", "task", "timer", "window_event")

    def __init__(self, job: Job, desk: Desk, model: ServedModel, window_bytes: int) -> None:
        self.job = job
        self.desk = desk
        self.model = model
        self.outbox: Outbox[Item] = Outbox(window_bytes)
        self.has_slot = False
        self.task: asyncio.Task[None] | None = None
        self.answer: Answer | None = None
        self.timer: asyncio.TimerHandle | None = None
        # Set while the job waits for its caller to pass frames on.
        self.window_event: asyncio.Event | None = None
        # Done or Error while no session takes it.
        self.final: Item | None = None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.answer.usage if self.answer is not None else Usage()
