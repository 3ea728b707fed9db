"""The ledger's accounts. An account is a name and an owner; names say what the money may be used for."""

from typing import Final, NamedTuple

# Money that a buyer can spend.
BUYER_AVAILABLE: Final = "buyer:available"
# Money that a router has leased for a buyer's jobs (credit leases).
BUYER_LEASED: Final = "buyer:leased"
# A provider's earnings that are still held back.
PROVIDER_PENDING: Final = "provider:pending"
# A provider's earnings that can be paid out.
PROVIDER_AVAILABLE: Final = "provider:available"
# What the platform keeps. Each charge passes through it: in from the buyer, out to the providers; what stays is the
# fee.
PLATFORM_FEES: Final = "platform:fees"
# Pays what a buyer's balance did not cover. Below zero it is the platform's loss.
PLATFORM_INSURANCE: Final = "platform:insurance"
# Money whose owner is not known.
SUSPENSE: Final = "suspense"
# The world outside: operators, banks. The owner says which. Below zero: money that came in.
EXTERNAL_OPERATOR: Final = "external:operator"
EXTERNAL_PREFIX: Final = "external:"

# Owner of the platform's accounts.
PLATFORM: Final = "platform"

NAMES: Final = frozenset({
    BUYER_AVAILABLE, BUYER_LEASED, PROVIDER_PENDING, PROVIDER_AVAILABLE, PLATFORM_FEES, PLATFORM_INSURANCE, SUSPENSE,
})  # fmt: skip
# Accounts that belong to a buyer or provider: what is not reserved never goes below zero (I2, and a CHECK in the
# database).
NEVER_NEGATIVE: Final = frozenset({BUYER_AVAILABLE, BUYER_LEASED, PROVIDER_PENDING, PROVIDER_AVAILABLE})


class Account(NamedTuple):
    """One account: what for, and whose."""

    name: str
    owner: str

    def __str__(self) -> str:
        return f"{self.name} of {self.owner}"


def is_account_name(name: str) -> bool:
    """Whether the ledger knows accounts of that name."""
    return name in NAMES or (name.startswith(EXTERNAL_PREFIX) and len(name) > len(EXTERNAL_PREFIX))


FEES: Final = Account(PLATFORM_FEES, PLATFORM)
INSURANCE: Final = Account(PLATFORM_INSURANCE, PLATFORM)
