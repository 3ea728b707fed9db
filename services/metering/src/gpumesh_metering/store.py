"""What metering asks of its store. Rows and connections stay behind these names; the one implementation is in
postgres*.py.

Unavailable is gpumesh_runtime's error with reason DATABASE_UNAVAILABLE: the database is away, full or starting; the
same call may work later, and whether it took effect is not known. Everything here may be repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, Protocol

from gpumesh_metering.domain.ledger import Transfer
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.domain.settlement import Settlement


class StoreRefusedError(Exception):
    """The database refuses this content, now and later: some value in it is out of range or breaks a constraint."""


class Terms(NamedTuple):
    """What many jobs of a batch share: buyer, model, price, and how they ended. Sent to the database once per batch."""

    account_id: str
    key_id: str
    model_id: str
    model_revision: str
    reason: str
    modality: int
    outcome: int
    source: int
    price_version: int
    input_price: int
    output_price: int
    cached_input_price: int | None


class Maker(NamedTuple):
    """Who produced a segment, and how."""

    provider_id: str
    node_id: str
    quantisation: str
    engine_name: str
    engine_version: str


@dataclass(slots=True)
class SettleBatch:
    """Jobs to settle in one transaction, as columns: no object per row. Places, terms and makers count from 1.

    jobs, segments and counts: one list per column of settle_sql.JOB_INT, SEGMENT_INT and COUNT_INT. Ids: 16 bytes each.
    """

    terms: dict[Terms, int] = field(default_factory=dict)
    makers: dict[Maker, int] = field(default_factory=dict)
    job_ids: list[bytes] = field(default_factory=list)
    charge_ids: list[bytes] = field(default_factory=list)
    shortfall_ids: list[bytes] = field(default_factory=list)
    pay_ids: list[bytes] = field(default_factory=list)
    jobs: tuple[list[int], ...] = field(default_factory=lambda: tuple([] for _ in range(8)))
    segments: tuple[list[int], ...] = field(default_factory=lambda: tuple([] for _ in range(6)))
    counts: tuple[list[int], ...] = field(default_factory=lambda: tuple([] for _ in range(6)))

    def add_job(
        self, job_id: bytes, charge_id: bytes, shortfall_id: bytes, terms: Terms, hold: int, settled: Settlement
    ) -> int:
        """Adds a job; its place. Segments and counts of it follow with that place."""
        known = self.terms
        number = known.get(terms)
        if number is None:
            number = known[terms] = len(known) + 1
        usage = settled.usage
        columns = self.jobs
        columns[0].append(number)
        columns[1].append(usage.prompt)
        columns[2].append(usage.completion)
        columns[3].append(usage.cached)
        columns[4].append(usage.reasoning)
        columns[5].append(settled.charge)
        columns[6].append(settled.fee)
        columns[7].append(hold)
        self.charge_ids.append(charge_id)
        self.shortfall_ids.append(shortfall_id)
        self.job_ids.append(job_id)
        return len(self.job_ids)

    def add_segment(self, place: int, maker: Maker, fence: int, start: int, end: int, pay: int, pay_id: bytes) -> None:
        """Adds a segment of the job at `place`. Tokens [start, end), pay in nano-USD."""
        known = self.makers
        number = known.get(maker)
        if number is None:
            number = known[maker] = len(known) + 1
        columns = self.segments
        columns[0].append(place)
        columns[1].append(number)
        columns[2].append(fence)
        columns[3].append(start)
        columns[4].append(end)
        columns[5].append(pay)
        self.pay_ids.append(pay_id)

    def add_count(self, place: int, fence: int, prompt: int, completion: int, cached: int, reasoning: int) -> None:
        """Adds what a node counted for the job at `place`."""
        for column, value in zip(self.counts, (place, fence, prompt, completion, cached, reasoning), strict=True):
            column.append(value)


class BuyerBalance(NamedTuple):
    """What a buyer can spend, nano-USD. version: grows with each change; 0 for an account never used."""

    account_id: str
    available: int
    version: int


class SettleResult(NamedTuple):
    """repeated: places, from 1, of jobs that had been settled before. balances: buyers whose balance changed."""

    repeated: Sequence[int]
    balances: Sequence[BuyerBalance]


class StoredSettlement(NamedTuple):
    """A settlement as it was committed. pays: (fence, nano-USD), in order of tokens."""

    price: Price
    charge: int
    fee: int
    pays: Sequence[tuple[int, int]]


class Evidence(NamedTuple):
    """A record that is kept without being settled. body: Settle, encoded."""

    job_id: bytes
    fence: int
    body: bytes


class UsageSegment(NamedTuple):
    """One provider's part of a settled job. pay: nano-USD."""

    fence: int
    provider_id: str
    node_id: str
    tokens: int
    pay: int


class UsageRow(NamedTuple):
    """One settled job. number: its place in the order of settling. Amounts: nano-USD."""

    number: int
    job_id: bytes
    account_id: str
    key_id: str
    model_id: str
    outcome: int
    prompt: int
    completion: int
    cached: int
    reasoning: int
    price: Price
    charge: int
    fee: int
    settle_time: datetime
    segments: Sequence[UsageSegment]


class CheckResult(NamedTuple):
    """What the checker found: one sentence per violation, and how much it looked at."""

    violations: Sequence[str]
    transfers: int
    settlements: int


class SettleStore(Protocol):
    """What the group-commit writer needs. Every method may raise Unavailable or StoreRefusedError."""

    async def settle(self, batch: SettleBatch) -> SettleResult:
        """Commits a batch, all or nothing. Jobs settled before are left as they are."""

    async def stored(self, job_ids: Sequence[bytes]) -> dict[bytes, StoredSettlement]:
        """Settlements of those jobs, where there are any."""

    async def park(self, receipts: Sequence[Evidence]) -> None:
        """Keeps receipts that have no record yet. Repetition is harmless."""

    async def suspend(self, records: Sequence[Evidence], why: str) -> None:
        """Puts records into suspense, for a person to look at. Repetition is harmless."""

    async def sweep_parked(self, older_than_s: float) -> int:
        """Moves receipts parked for longer into suspense and drops those whose job has settled; how many went to
        suspense.
        """


class LedgerStore(Protocol):
    """What balances and operators' calls need. Every method may raise Unavailable."""

    async def balances(self, account_ids: Sequence[str]) -> list[BuyerBalance]:
        """What buyers can spend, one row per account asked for, in any order."""

    async def credit(self, credit_id: str, account_id: str, amount: int, memo: str, operator: str) -> BuyerBalance:
        """Credits once per id. Raises AlreadyExists when the id was used with other fields, StoreRefusedError when it
        cannot be.
        """

    async def apply(self, transfers: Sequence[Transfer]) -> None:
        """Appends transfers of any kind and moves balances, all or nothing; known ids are skipped. Raises
        StoreRefusedError.
        """

    async def owner_balances(self, owner_id: str) -> dict[str, int]:
        """What an owner's accounts hold, by account name: posted less reserved, nano-USD."""

    async def prices(self) -> dict[str, Price]:
        """Current prices by model."""

    async def set_price(self, model_id: str, input_price: int, output_price: int, operator: str) -> Price:
        """Publishes a price; the same as the current one is not published again."""

    async def usage(self, account_id: str, job_id: bytes, before: int | None, limit: int) -> list[UsageRow]:
        """Settled jobs, newest first, numbers below `before`. Empty account or job: all."""

    async def check(self) -> CheckResult:
        """Verifies the invariants over everything stored, in one snapshot."""
