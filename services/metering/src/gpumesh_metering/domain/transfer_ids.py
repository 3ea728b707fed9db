"""Ids of transfers: UUIDv5(kind of business, business key), so that doing the same thing twice makes the same row once."""

import hashlib
import uuid
from typing import Any, Final

# Namespace of all our transfers: UUIDv5 of the DNS name below, fixed for ever.
_ROOT: Final = uuid.uuid5(uuid.NAMESPACE_DNS, "ledger.gpumesh")


class TransferIds:
    """Makes ids of one kind of business, for example "settle.pay". Equal to uuid5(namespace of the kind, key bytes)."""

    def __init__(self, kind: str) -> None:
        self.namespace = uuid.uuid5(_ROOT, kind)
        # A hash that has already read the namespace: copying it is cheaper than hashing it again.
        self._start: Any = hashlib.sha1(self.namespace.bytes, usedforsecurity=False)

    def digest(self, key: bytes) -> bytes:
        """20 bytes, of which the first 16 make the id once version and variant are set: id() does, or the settle statement.

        0.2 us; uuid.uuid5 takes 2, and a settlement needs three.
        """
        digest = self._start.copy()
        digest.update(key)
        made: bytes = digest.digest()
        return made

    def id(self, key: bytes) -> uuid.UUID:
        """The id."""
        return uuid.UUID(bytes=self.digest(key)[:16], version=5)


DIGEST_BYTES: Final = 20

# Buyer pays a job; key: job id.
SETTLE_CHARGE: Final = TransferIds("settle.charge")
# Insurance pays what the buyer's balance did not cover; key: job id.
SETTLE_SHORTFALL: Final = TransferIds("settle.shortfall")
# A provider is paid for one try; key: job id + fence, 8 bytes big-endian.
SETTLE_PAY: Final = TransferIds("settle.pay")
# An operator's credit; key: credit id, UTF-8.
CREDIT: Final = TransferIds("credit")


def pay_key(job_id: bytes, fence: int) -> bytes:
    """Business key of a try's pay. fence: 0 .. 2^63-1."""
    return job_id + fence.to_bytes(8, "big")
