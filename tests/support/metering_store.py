"""A SettleStore in memory, built on the ledger's core: for the writer's tests, and as the judge of the PostgreSQL one."""

import asyncio
from collections.abc import Sequence

from gpumesh_metering.domain.accounts import BUYER_AVAILABLE, EXTERNAL_OPERATOR, Account
from gpumesh_metering.domain.invariants import SettledJob, violations
from gpumesh_metering.domain.ledger import Ledger, Transfer, TransferKind
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.domain.settlement import Outcome, Segment, Settlement, Usage, transfers_of
from gpumesh_metering.domain.transfer_ids import CREDIT
from gpumesh_metering.store import (
    BuyerBalance,
    Evidence,
    SettleBatch,
    SettleResult,
    StoredSettlement,
    StoreRefusedError,
    Terms,
)
from gpumesh_runtime.errors import Reason, Unavailable


class MemorySettleStore:
    """Keeps what was settled. Programmable: `away` answers Unavailable, `poison` job ids are refused, `hold` stops
    before the commit.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.jobs: dict[bytes, tuple[str, Settlement, Price]] = {}
        self.parked: dict[tuple[bytes, int], bytes] = {}
        self.suspense: list[tuple[Evidence, str]] = []
        self.poison: set[bytes] = set()
        self.away = False
        self.lose_next_answer = False
        self.batches: list[int] = []
        self.go = asyncio.Event()
        self.go.set()

    def credit(self, account_id: str, amount: int) -> None:
        """As an operator does."""
        operator, buyer = Account(EXTERNAL_OPERATOR, "operator"), Account(BUYER_AVAILABLE, account_id)
        key = f"{account_id} {len(self.ledger.transfers)}".encode()
        self.ledger.apply(Transfer(CREDIT.id(key), TransferKind.DIRECT, operator, buyer, amount, "credit"))

    def available(self, name: str, owner: str) -> int:
        """What an account has."""
        return self.ledger.available(Account(name, owner))

    def violations(self) -> list[str]:
        """Of the invariants."""
        jobs = [
            SettledJob(
                job_id,
                account_id,
                done.charge,
                done.fee,
                [
                    (s.fence, s.start, s.end, s.provider_id, pay)
                    for s, pay in zip(done.segments, done.pays, strict=True)
                ],
            )
            for job_id, (account_id, done, _) in self.jobs.items()
        ]
        return violations(self.ledger.transfers.values(), self.ledger.balances, jobs)

    async def settle(self, batch: SettleBatch) -> SettleResult:
        """As SettleStore: all or nothing."""
        await self._reach()
        if self.poison & set(batch.job_ids):
            raise StoreRefusedError("poison")
        self.batches.append(len(batch.job_ids))
        repeated: list[int] = []
        touched: set[str] = set()
        for place, (job_id, terms, settlement) in enumerate(jobs_of(batch), 1):
            if job_id in self.jobs:
                repeated.append(place)
                continue
            account_id = terms[0]
            self.jobs[job_id] = (account_id, settlement, Price(*terms[8:]))
            available = self.available(BUYER_AVAILABLE, account_id)
            for transfer in transfers_of(job_id, account_id, settlement, available):
                self.ledger.apply(transfer)
                if transfer.debit.name == BUYER_AVAILABLE:
                    touched.add(account_id)
        if self.lose_next_answer:
            self.lose_next_answer = False
            raise Unavailable(Reason.DATABASE_UNAVAILABLE)
        balances = []
        for account_id in touched:
            balance = self.ledger.balances[Account(BUYER_AVAILABLE, account_id)]
            balances.append(BuyerBalance(account_id, balance.available, balance.version))
        return SettleResult(repeated, balances)

    async def stored(self, job_ids: Sequence[bytes]) -> dict[bytes, StoredSettlement]:
        """As SettleStore."""
        await self._reach()
        found = {}
        for job_id in job_ids:
            if job_id in self.jobs:
                _, done, price = self.jobs[job_id]
                pays = [(segment.fence, pay) for segment, pay in zip(done.segments, done.pays, strict=True)]
                found[job_id] = StoredSettlement(price, done.charge, done.fee, pays)
        return found

    async def park(self, receipts: Sequence[Evidence]) -> None:
        """As SettleStore."""
        await self._reach()
        for receipt in receipts:
            self.parked.setdefault((receipt.job_id, receipt.fence), receipt.body)

    async def suspend(self, records: Sequence[Evidence], why: str) -> None:
        """As SettleStore."""
        await self._reach()
        self.suspense += [(record, why) for record in records]

    async def sweep_parked(self, older_than_s: float) -> int:
        """As SettleStore, with every receipt old enough."""
        moved = [key for key in self.parked if key[0] not in self.jobs]
        self.suspense += [(Evidence(*key, self.parked[key]), "old") for key in moved]
        self.parked.clear()
        return len(moved)

    async def _reach(self) -> None:
        await self.go.wait()
        if self.away:
            raise Unavailable(Reason.DATABASE_UNAVAILABLE)


def jobs_of(batch: SettleBatch) -> list[tuple[bytes, Terms, Settlement]]:
    """A batch's rows read back as settlements."""
    terms, makers = list(batch.terms), list(batch.makers)
    found = []
    for place, (job_id, row) in enumerate(zip(batch.job_ids, batch.jobs, strict=True), 1):
        number, prompt, completion, cached, reasoning, charge, fee, _ = row
        lines = [line for line in batch.segments if line[0] == place]
        segments = [Segment(fence, start, end, *makers[maker - 1][:2]) for _, maker, fence, start, end, _ in lines]
        usage = Usage(prompt, completion, cached, reasoning)
        outcome = Outcome(terms[number - 1][6])
        settlement = Settlement(outcome, usage, charge, fee, segments, [line[5] for line in lines])
        found.append((job_id, terms[number - 1], settlement))
    return found
