"""Jobs that wait for a seat. The seam where the fair queue comes: whoever implements Queue decides who is next. Pure."""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from gpumesh_scheduler.domain.job import Job
from gpumesh_scheduler.domain.nouns import ModelKey


class Queue(Protocol):
    """What the board needs of a queue. A job is in it at most once."""

    def push(self, job: Job) -> None:
        """Adds a job; one that was in it before gets its old place (Job.order) again."""

    def remove(self, job: Job) -> None:
        """Takes a job out, wherever it is."""

    def waiting(self, key: ModelKey) -> Iterator[Job]:
        """Jobs of a model in the order in which they should run. Not to be changed while it is read."""

    def length(self, key: ModelKey) -> int:
        """How many wait for a model."""

    def models(self) -> list[ModelKey]:
        """Models that something waits for."""


class FifoQueue:
    """First come, first served, per model."""

    def __init__(self) -> None:
        self._lines: dict[ModelKey, deque[Job]] = {}
        self._next = 0

    def push(self, job: Job) -> None:
        """Adds at the end, or where it was before."""
        line = self._lines.setdefault(job.terms.model, deque())
        if job.order < 0:
            job.order = self._next
            self._next += 1
        if not line or line[-1].order < job.order:
            line.append(job)
        elif job.order < line[0].order:
            line.appendleft(job)
        else:
            insort(line, job, key=lambda other: other.order)

    def remove(self, job: Job) -> None:
        """Takes it out; from the front in constant time."""
        line = self._lines.get(job.terms.model)
        if line is None:
            return
        if line[0] is job:
            line.popleft()
        else:
            try:
                line.remove(job)
            except ValueError:
                return
        if not line:
            del self._lines[job.terms.model]

    def waiting(self, key: ModelKey) -> Iterator[Job]:
        """In order of arrival."""
        return iter(self._lines.get(key, ()))

    def length(self, key: ModelKey) -> int:
        """How many."""
        line = self._lines.get(key)
        return len(line) if line else 0

    def models(self) -> list[ModelKey]:
        """Models with a line."""
        return list(self._lines)
