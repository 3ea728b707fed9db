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


class StoreRefusedError(Exception):
    """The database refuses this content, now and later: some value in it is out of range or breaks a constraint."""


# What many jobs of a batch share: buyer, model, price, and how they ended; sent to the database once per batch. In order: account id,
# key id, model id, model revision, reason, modality, outcome, source, price version, input, output and cached input price. Plain tuples
# here and below: a named one costs as much as verifying half a seal.
Terms = tuple[str, str, str, str, str, int, int, int, int, int, int, int | None]
# Who produced a segment, and how: provider id, node id, quantisation, engine name, engine version.
Maker = tuple[str, str, str, str, str]


@dataclass(slots=True)
class SettleBatch:
    """Jobs to settle in one transaction. Places, terms and makers count from 1.

    job_ids: 16 bytes each. charge_ids, shortfall_ids: digests of a job's transfers; pay_ids: one per segment (TransferIds.digest).
    jobs: (terms, prompt, completion, cached and reasoning tokens, charge, fee, hold). segments: (place of the job, maker, fence, start,
    end, pay). counts: (place of the job, fence, prompt, completion, cached and reasoning tokens). Amounts in nano-USD.
    """

    terms: dict[Terms, int] = field(default_factory=dict)
    makers: dict[Maker, int] = field(default_factory=dict)
    job_ids: list[bytes] = field(default_factory=list)
    charge_ids: list[bytes] = field(default_factory=list)
    shortfall_ids: list[bytes] = field(default_factory=list)
    pay_ids: list[bytes] = field(default_factory=list)
    jobs: list[tuple[int, int, int, int, int, int, int, int]] = field(default_factory=list)
    segments: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    counts: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)

    def number_of_terms(self, terms: Terms) -> int:
        """The number of these terms in this batch."""
        return self.terms.setdefault(terms, len(self.terms) + 1)

    def number_of_maker(self, maker: Maker) -> int:
        """The number of this maker in this batch."""
        return self.makers.setdefault(maker, len(self.makers) + 1)


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
