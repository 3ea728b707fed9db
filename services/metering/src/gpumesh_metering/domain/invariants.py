"""What must always be true of the ledger. Pure: facts in, one sentence per violation out.

I1 all balances sum to 0. I2 no buyer's or provider's account has less than nothing to spend. I4 each settlement has one
debit, equal to its credits. I5 a job's segments are contiguous from 0 and disjoint, each with a fence of its own. I7
balances are the fold of transfers. (I3, leases, I6, unsettled jobs, and I8-I10 belong to parts that come later or to
other services.) The same judgements over a live database are in checks.py, as SQL: a ledger does not fit in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gpumesh_metering.domain.accounts import BUYER_AVAILABLE, FEES, INSURANCE, NEVER_NEGATIVE, PROVIDER_PENDING, Account
from gpumesh_metering.domain.ledger import Balance, Transfer, TransferKind, fold


class SettledJob(NamedTuple):
    """A settlement as stored. segments: (fence, start, end, provider id, pay), in order of start."""

    job_id: bytes
    account_id: str
    charge: int
    fee: int
    segments: Sequence[tuple[int, int, int, str, int]]


def violations(
    transfers: Iterable[Transfer], balances: Mapping[Account, Balance], settlements: Iterable[SettledJob]
) -> list[str]:
    """Judges a whole ledger. Empty: all invariants hold."""
    lines = list(transfers)
    jobs = list(settlements)
    return [
        *_sum_is_zero(balances),
        *_nobody_below_zero(balances),
        *_debits_equal_credits(lines, jobs),
        *_segments_fit(jobs),
        *_balances_are_the_fold(lines, balances),
        *_pendings_resolve_once(lines),
    ]


def _sum_is_zero(balances: Mapping[Account, Balance]) -> list[str]:
    total = sum(balance.posted for balance in balances.values())
    return [f"I1: all balances sum to {total} nano-USD instead of 0."] if total else []


def _nobody_below_zero(balances: Mapping[Account, Balance]) -> list[str]:
    return [
        f"I2: {account} has {balance.available} nano-USD to spend."
        for account, balance in balances.items()
        if account.name in NEVER_NEGATIVE and balance.available < 0
    ]


def _debits_equal_credits(transfers: list[Transfer], jobs: list[SettledJob]) -> list[str]:
    debit: dict[bytes, int] = {}
    pay: dict[bytes, int] = {}
    found = []
    for line in transfers:
        if line.job_id is None or line.kind is not TransferKind.DIRECT:
            continue
        if line.credit == FEES and (line.debit.name == BUYER_AVAILABLE or line.debit == INSURANCE):
            debit[line.job_id] = debit.get(line.job_id, 0) + line.amount
        elif line.debit == FEES and line.credit.name == PROVIDER_PENDING:
            pay[line.job_id] = pay.get(line.job_id, 0) + line.amount
        else:
            found.append(f"I4: transfer {line.id} of job {line.job_id.hex()} goes from {line.debit} to {line.credit}.")
    for job in jobs:
        paid_in, paid_out = debit.pop(job.job_id, 0), pay.pop(job.job_id, 0)
        by_segment = sum(segment[4] for segment in job.segments)
        if paid_in != job.charge or paid_out != by_segment or job.charge != job.fee + by_segment:
            found.append(
                f"I4: job {job.job_id.hex()} charged {job.charge} with fee {job.fee} and pays {by_segment}, "
                f"but its transfers took {paid_in} and paid {paid_out}."
            )
    found += [f"I4: transfers of job {job_id.hex()} belong to no settlement." for job_id in debit.keys() | pay.keys()]
    return found


def _segments_fit(jobs: list[SettledJob]) -> list[str]:
    found = []
    for job in jobs:
        position = 0
        for _, start, end, _, _ in job.segments:
            if start != position or end < start:
                found.append(f"I5: job {job.job_id.hex()} has a segment {start}..{end} where {position} was next.")
                break
            position = end
        if len({segment[0] for segment in job.segments}) != len(job.segments):
            found.append(f"I5: job {job.job_id.hex()} has two segments with one fence.")
    return found


def _balances_are_the_fold(transfers: list[Transfer], balances: Mapping[Account, Balance]) -> list[str]:
    folded = fold(transfers)
    found = []
    for account in folded.keys() | balances.keys():
        want, have = folded.get(account, Balance()), balances.get(account, Balance())
        if (want.posted, want.reserved) != (have.posted, have.reserved):
            found.append(
                f"I7: {account} shows {have.posted} posted and {have.reserved} reserved, "
                f"its transfers add up to {want.posted} and {want.reserved}."
            )
    return found


def _pendings_resolve_once(transfers: list[Transfer]) -> list[str]:
    pending = {line.id: line for line in transfers if line.kind is TransferKind.PENDING}
    seen: set[object] = set()
    found = []
    for line in transfers:
        if line.pending_id is None:
            continue
        origin = pending.get(line.pending_id)
        if origin is None or line.amount > origin.amount or line.pending_id in seen:
            found.append(f"I7: transfer {line.id} does not resolve a pending transfer properly.")
        seen.add(line.pending_id)
    return found
