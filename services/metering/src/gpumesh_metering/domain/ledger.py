"""The ledger's core: append-only transfers and the balances that they add up to.

A transfer moves nano-USD from one account (debit) to another (credit). Four kinds:
DIRECT moves at once. PENDING reserves: the debit account keeps the money but cannot spend it. POST resolves a PENDING
and moves at most its amount, the rest is free again. VOID resolves it and moves nothing. A PENDING is resolved at most
once. The database holds the same rules (migrations/0001_ledger.sql); tests run both against each other.
Source of the shape: TigerBeetle's two-phase transfers.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from gpumesh_metering.domain.accounts import NEVER_NEGATIVE, Account, is_account_name

INT64_MAX: Final = 2**63 - 1


class TransferKind(IntEnum):
    """What a transfer does. The numbers are stored."""

    DIRECT = 1
    PENDING = 2
    POST = 3
    VOID = 4


class LedgerError(Exception):
    """A transfer that the ledger refuses. `code` is one of the constants of Refusal."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Refusal:
    """Codes of LedgerError."""

    AMOUNT = "amount"  # not in range for the kind
    ACCOUNT = "account"  # unknown name, empty owner, or debit equals credit
    CONFLICT = "conflict"  # the id exists with other fields
    NO_PENDING = "no pending"  # post or void of something that is not a pending transfer, or with other accounts
    RESOLVED = "resolved"  # the pending transfer was resolved before
    OVERPOST = "overpost"  # post of more than was pending
    OVERDRAWN = "overdrawn"  # an account that may not would go below zero
    OVERFLOW = "overflow"  # a balance would leave int64


@dataclass(frozen=True, slots=True)
class Transfer:
    """One line of the ledger. amount: nano-USD, > 0 (VOID: 0). pending_id: of POST and VOID, else None. purpose: for
    people.
    """

    id: uuid.UUID
    kind: TransferKind
    debit: Account
    credit: Account
    amount: int
    purpose: str
    pending_id: uuid.UUID | None = None
    job_id: bytes | None = None


@dataclass(slots=True)
class Balance:
    """posted: what is there, nano-USD. reserved: of it, promised by pending transfers. version: grows with each change."""

    posted: int = 0
    reserved: int = 0
    version: int = 0

    @property
    def available(self) -> int:
        """What can be spent."""
        return self.posted - self.reserved


@dataclass
class Ledger:
    """State of the whole ledger in memory: the rules' reference, and the judge in tests."""

    transfers: dict[uuid.UUID, Transfer] = field(default_factory=dict)
    balances: dict[Account, Balance] = field(default_factory=dict)
    resolved: dict[uuid.UUID, uuid.UUID] = field(default_factory=dict)

    def available(self, account: Account) -> int:
        """What an account can spend; 0 for one never used."""
        balance = self.balances.get(account)
        return balance.available if balance is not None else 0

    def apply(self, transfer: Transfer) -> bool:
        """Appends one transfer. False when it is there already with the same fields. Raises LedgerError and changes
        nothing otherwise.
        """
        known = self.transfers.get(transfer.id)
        if known is not None:
            if known != transfer:
                raise LedgerError(Refusal.CONFLICT, f"transfer {transfer.id} exists with other fields")
            return False
        _check_shape(transfer)
        moved, debit_reserve = self._effect(transfer)
        self._check_room(transfer, moved, debit_reserve)
        debit, credit = self._balance(transfer.debit), self._balance(transfer.credit)
        debit.posted -= moved
        debit.reserved += debit_reserve
        debit.version += 1
        if moved:
            credit.posted += moved
            credit.version += 1
        self.transfers[transfer.id] = transfer
        if transfer.pending_id is not None:
            self.resolved[transfer.pending_id] = transfer.id
        return True

    def _effect(self, transfer: Transfer) -> tuple[int, int]:
        """(nano-USD moved from debit to credit, change of the debit account's reserve)."""
        if transfer.kind is TransferKind.DIRECT:
            return transfer.amount, 0
        if transfer.kind is TransferKind.PENDING:
            return 0, transfer.amount
        pending = self.transfers.get(transfer.pending_id) if transfer.pending_id else None
        if (
            pending is None
            or pending.kind is not TransferKind.PENDING
            or (pending.debit, pending.credit) != (transfer.debit, transfer.credit)
        ):
            raise LedgerError(
                Refusal.NO_PENDING, f"{transfer.pending_id} is no pending transfer between these accounts"
            )
        if pending.id in self.resolved:
            raise LedgerError(Refusal.RESOLVED, f"pending transfer {pending.id} was resolved before")
        if transfer.amount > pending.amount:
            raise LedgerError(Refusal.OVERPOST, f"{transfer.amount} is more than the {pending.amount} pending")
        return transfer.amount, -pending.amount

    def _check_room(self, transfer: Transfer, moved: int, debit_reserve: int) -> None:
        debit = self.balances.get(transfer.debit, Balance())
        credit = self.balances.get(transfer.credit, Balance())
        left = debit.posted - moved - (debit.reserved + debit_reserve)
        if transfer.debit.name in NEVER_NEGATIVE and left < 0:
            raise LedgerError(Refusal.OVERDRAWN, f"{transfer.debit} would be {left}")
        if (
            credit.posted + moved > INT64_MAX
            or debit.posted - moved < -INT64_MAX
            or debit.reserved + debit_reserve > INT64_MAX
        ):
            raise LedgerError(Refusal.OVERFLOW, "a balance would leave the range of int64")

    def _balance(self, account: Account) -> Balance:
        return self.balances.setdefault(account, Balance())


def _check_shape(transfer: Transfer) -> None:
    void = transfer.kind is TransferKind.VOID
    if not (transfer.amount == 0 if void else 0 < transfer.amount <= INT64_MAX):
        raise LedgerError(Refusal.AMOUNT, f"{transfer.amount} nano-USD cannot be the amount of {transfer.kind.name}")
    for account in (transfer.debit, transfer.credit):
        if not is_account_name(account.name) or not account.owner:
            raise LedgerError(Refusal.ACCOUNT, f"{account!r} is no account")
    if transfer.debit == transfer.credit:
        raise LedgerError(Refusal.ACCOUNT, "debit and credit are the same account")
    if (transfer.pending_id is not None) != (transfer.kind in {TransferKind.POST, TransferKind.VOID}):
        raise LedgerError(Refusal.NO_PENDING, "post and void name a pending transfer, the others do not")


def fold(transfers: Iterable[Transfer]) -> dict[Account, Balance]:
    """Balances as the sum of transfers, in any order (I7). Does not judge them."""
    rows = list(transfers)
    pending = {row.id: row.amount for row in rows if row.kind is TransferKind.PENDING}
    balances: dict[Account, Balance] = {}
    for row in rows:
        debit, credit = balances.setdefault(row.debit, Balance()), balances.setdefault(row.credit, Balance())
        if row.kind is TransferKind.PENDING:
            debit.reserved += row.amount
            continue
        debit.posted -= row.amount
        credit.posted += row.amount
        if row.pending_id is not None:
            debit.reserved -= pending.get(row.pending_id, 0)
    return balances
