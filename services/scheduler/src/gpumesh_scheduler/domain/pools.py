"""Seats by model: which are free now, and what each model can take. Updated when something changes, never scanned per job. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from gpumesh_scheduler.domain.choice.filters import Block, gate, refuses
from gpumesh_scheduler.domain.choice.pick import SAMPLE, SEARCH, best, candidates
from gpumesh_scheduler.domain.nouns import ModelKey, Terms
from gpumesh_scheduler.domain.session import Seat, Session


@dataclass(frozen=True, slots=True)
class Capacity:
    """What this scheduler can take of one model, without its queue."""

    nodes: int
    slots: int
    free_slots: int
    outstanding_tokens: int
    features: frozenset[int]


class Pool:
    """The seats of one model."""

    __slots__ = ("free", "seats")

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        self.free: list[Seat] = []

    def place(self, seat: Seat, free: bool) -> None:
        """Puts a seat into the list of free ones or takes it out, in constant time."""
        if free:
            if seat.position < 0:
                seat.position = len(self.free)
                self.free.append(seat)
        elif seat.position >= 0:
            last = self.free.pop()
            if last is not seat:
                self.free[seat.position] = last
                last.position = seat.position
            seat.position = -1

    def capacity(self) -> Capacity:
        """Sums over the seats. 0.3 us a seat: done for models that changed, a few times a second."""
        nodes = slots = free = tokens = 0
        features: frozenset[int] = frozenset()
        for seat in self.seats.values():
            tokens += seat.outstanding_tokens
            if seat.session.gate() is None and seat.model.ready:
                nodes += 1
                slots += seat.model.slots
                free += max(0, seat.model.slots - seat.used)
                features |= seat.model.features
        return Capacity(nodes, slots, free, tokens, features)


class Pools:
    """All pools. `changed` collects models whose capacity is not as last told."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self.pools: dict[ModelKey, Pool] = {}
        self.changed: set[ModelKey] = set()
        # Model ids of the catalogue; None until it is known: then every model is let through.
        self.catalogue: frozenset[str] | None = None

    def add(self, seat: Seat) -> None:
        """A node began to serve a model."""
        key = seat.key
        pool = self.pools.get(key)
        if pool is None:
            pool = self.pools[key] = Pool()
        pool.seats[seat.session.node_id] = seat
        self.refresh(seat)

    def remove(self, seat: Seat) -> None:
        """It stopped."""
        key = seat.key
        pool = self.pools[key]
        pool.place(seat, False)
        if pool.seats.get(seat.session.node_id) is seat:
            del pool.seats[seat.session.node_id]
        if not pool.seats:
            del self.pools[key]
        self.changed.add(key)

    def refresh(self, seat: Seat) -> None:
        """Something about the seat or its session changed."""
        key = seat.key
        pool = self.pools.get(key)
        if pool is None or pool.seats.get(seat.session.node_id) is not seat:
            return  # a seat that was dropped while a try still held it
        listed = self.catalogue is None or key[0] in self.catalogue
        seat.block = gate(seat, seat.session.gate(), listed)
        pool.place(seat, seat.block is None)
        self.changed.add(key)

    def take(self, seat: Seat, cost: int) -> None:
        """A try takes a slot. The seat's state is computed again only when this was the last one."""
        seat.used += 1
        seat.outstanding_tokens += cost
        if seat.used >= seat.model.slots:
            self.refresh(seat)
        else:
            self.changed.add(seat.key)

    def give(self, seat: Seat, cost: int) -> None:
        """A try gives its slot back."""
        seat.used -= 1
        seat.outstanding_tokens -= cost
        if seat.block is Block.NO_FREE_SLOT:
            self.refresh(seat)
        else:
            self.changed.add(seat.key)

    def refresh_session(self, session: Session) -> None:
        """The session's state changed."""
        for seat in session.seats.values():
            self.refresh(seat)

    def choose(self, terms: Terms, excluded: frozenset[str]) -> Seat | None:
        """A free seat for the job; None when it has to wait. An excluded node serves again only where no other has the model."""
        pool = self.pools.get(terms.model)
        if pool is None or not pool.free:
            return None
        if excluded and len(excluded) >= len(pool.seats) and excluded.issuperset(pool.seats):
            excluded = frozenset()
        for most in (SAMPLE, SEARCH):
            # The sample may have missed the few that fit: look at many before letting the job wait.
            fit = [
                seat
                for seat in candidates(pool.free, self._random, most)
                if refuses(seat, seat.session.node_id, terms, excluded) is None
            ]
            if fit:
                return best(fit, self._random)
            if len(pool.free) <= most:
                break
        return None

    def serves(self, key: ModelKey) -> bool:
        """Whether any node here has the model, busy or not."""
        return key in self.pools
