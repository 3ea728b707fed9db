"""What the node needs of its journal. journal.py keeps it in files."""

from collections.abc import Iterator
from typing import Protocol

from gpumesh_node.domain.job import Receipt


class ReceiptStore(Protocol):
    """Receipts of served jobs until they are acknowledged, and the session counter. No content."""

    # The last write was refused (a full disk).
    failed: bool

    def __len__(self) -> int:
        """How many are without acknowledgement."""

    def receipts(self) -> Iterator[Receipt]:
        """All of them, oldest first."""

    def older_than(self, seconds: float) -> list[Receipt]:
        """Those written at least so long ago, oldest first."""

    def holds(self, job_id: bytes) -> bool:
        """Whether any try of the job has one."""

    def put(self, receipt: Receipt) -> bool:
        """Writes one; False when the disk refuses."""

    def drop(self, job_id: bytes, fence: int) -> bool:
        """Forgets one; False when it was not there."""

    def drop_expired(self) -> int:
        """Forgets those that nobody can settle any more; returns how many."""

    def next_session(self) -> int:
        """The next session's number, durable before it is used."""
