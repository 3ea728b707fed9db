"""What accounts can spend, as this router knows it: metering's last word minus the holds of jobs that run.

Holds live in this router's memory until the next issue's credit leases; a hold whose caller died ends by itself.
"""

from dataclasses import dataclass, field, replace
from typing import Final

from gpumesh_runtime.error_types import InsufficientBalance
from gpumesh_runtime.reasons import Reason

STALE_S: Final = 60.0
"""With metering away, a balance this old is no longer spent from (architecture.md 4)."""
HOLD_GRACE_S: Final = 60.0
"""A hold that nobody released ends this long after its job's deadline (mechanisms.md 6)."""


@dataclass(slots=True)
class _Account:
    available: int
    version: int
    held: int = 0
    charged: int = 0  # released charges that the next balance from metering will contain


@dataclass(frozen=True, slots=True)
class _Hold:
    account_id: str
    amount: int
    expires: float


@dataclass(slots=True)
class Balances:
    """Accounts and holds. Money in nano-USD, times in monotonic seconds."""

    metering_up: bool = False
    _metering_seen: float = float("-inf")
    _accounts: dict[str, _Account] = field(default_factory=dict)
    _holds: dict[bytes, _Hold] = field(default_factory=dict)

    def up(self) -> None:
        """Metering answers: it pushes every change of the accounts that were asked for on this link, so all must be asked for again."""
        self.metering_up = True
        self._accounts = {account_id: account for account_id, account in self._accounts.items() if account.held}
        for account in self._accounts.values():
            account.version = -1

    def down(self, now: float) -> None:
        """Metering is away: balances are spent from for STALE_S more."""
        self.metering_up = False
        self._metering_seen = now

    def knows(self, account_id: str, now: float) -> bool:
        """Whether the account's balance is known and fresh enough to admit from."""
        account = self._accounts.get(account_id)
        if account is None or (account.version < 0 and self.metering_up):
            return False
        return self.metering_up or now - self._metering_seen < STALE_S

    def update(self, account_id: str, available: int, version: int) -> None:
        """Takes a balance from metering; one that is older than ours changes nothing."""
        account = self._accounts.get(account_id)
        if account is None:
            self._accounts[account_id] = _Account(available, version)
        elif version >= account.version:
            if version > account.version:
                account.charged = 0
            account.available, account.version = available, version

    def hold(self, job_id: bytes, account_id: str, amount: int, expires: float) -> None:
        """Reserves `amount` for a job; a further attempt replaces the hold of the one before.

        Raises InsufficientBalance when nothing is left beside what runs already.
        """
        earlier = self._holds.pop(job_id, None)
        if earlier is not None:
            self._accounts[earlier.account_id].held -= earlier.amount
        account = self._accounts[account_id]
        if self.spare(account_id) <= 0:
            raise InsufficientBalance(
                Reason.INSUFFICIENT_BALANCE,
                "The account has no credit left for this request. Add credit and try again.",
                metadata={"available_nano_usd": str(account.available), "held_nano_usd": str(account.held)},
            )
        account.held += amount
        self._holds[job_id] = _Hold(account_id, amount, expires + HOLD_GRACE_S)

    def release(self, job_id: bytes, charge: int, still_held: int = 0) -> None:
        """Ends the hold of a job or grant, or lowers a grant's to what its running jobs still hold.

        The charge stays reserved until metering's next word. Repetition is harmless.
        """
        hold = self._holds.pop(job_id, None)
        if hold is not None:
            account = self._accounts[hold.account_id]
            kept = min(max(still_held, 0), hold.amount)
            account.held -= hold.amount - kept
            account.charged += min(max(charge, 0), hold.amount - kept)
            if kept:
                self._holds[job_id] = replace(hold, amount=kept)

    def available(self, account_id: str) -> int:
        """Metering's last word, nano-USD."""
        return self._accounts[account_id].available

    def spare(self, account_id: str) -> int:
        """What the account can still reserve, nano-USD."""
        account = self._accounts[account_id]
        return account.available - account.held - account.charged

    def expire(self, now: float) -> int:
        """Ends holds whose callers never released them; returns how many."""
        gone = [job_id for job_id, hold in self._holds.items() if hold.expires <= now]
        for job_id in gone:
            self.release(job_id, 0)
        return len(gone)

    @property
    def holds(self) -> int:
        """Holds alive."""
        return len(self._holds)
