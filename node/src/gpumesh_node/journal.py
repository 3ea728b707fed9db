"""The node's durable journal: receipts of served jobs until they are acknowledged, and the session counter. No content, ever.

Append-only segment files in a folder that only the owner can read. A receipt is written (write(2)) before its Done leaves the node, so
a crash of the process loses none; fsync runs in a thread, at most 10 ms later and for all that came in between, so a crash of the
*machine* may lose the last 10 ms. That costs nothing while the scheduler lives: Done carried the same receipt. It is not worth a
disk's latency on every answer.

When a segment is full a new one begins with a copy of what is still open; older ones are deleted once that copy is on the disk.
Replaying old and new together gives the same state, so a crash at any moment in between is harmless.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from gpumesh_node.domain.job import Receipt
from gpumesh_node.domain.records import (
    SEGMENT_HEAD,
    Counter,
    Drop,
    Key,
    Put,
    encode_counter,
    encode_drop,
    encode_put,
    scan,
)

_PREFIX: Final = "receipts."
_SUFFIX: Final = ".log"
_SYNC_DELAY_S: Final = 0.01
_ROTATE_BYTES: Final = 4 * 1024 * 1024
# A receipt is refused for good after its settle_by, 24 h; a week covers a mesh that was away for a long weekend.
_KEEP_S: Final = 7 * 24 * 3600


class JournalError(Exception):
    """The journal cannot be opened or written. The text names the path and the problem."""


class Journal:
    """Receipts by (job_id, fence) and the session counter.

    folder: made if absent, 0700; locked against a second process. wall: Unix seconds. rotate_bytes: size at which a new segment begins.
    Raises JournalError when it cannot be opened or another process holds it.
    """

    def __init__(
        self, folder: Path, *, wall: Callable[[], float] = time.time, rotate_bytes: int = _ROTATE_BYTES
    ) -> None:
        self._folder = folder
        self._wall = wall
        self._rotate_bytes = rotate_bytes
        self._open: dict[Key, Put] = {}
        self._open_bytes = 0
        self._drops = bytearray()
        self._counter = 0
        self._dirty = False
        self._sync: asyncio.Task[None] | None = None
        self._old: list[Path] = []
        self.failed = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = _lock(folder / "lock")
            self._recover()
            self._begin_segment()
            self._fsync()
        except OSError as err:
            raise JournalError(f"the journal in {folder} cannot be opened: {err.strerror}") from err

    # --- what it holds --------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._open)

    def receipts(self) -> Iterator[Receipt]:
        """Receipts without acknowledgement, oldest first."""
        return iter([put.receipt for put in self._open.values()])

    def older_than(self, seconds: float) -> list[Receipt]:
        """Receipts written at least so long ago, oldest first."""
        latest = self._wall() - seconds
        return [put.receipt for put in self._open.values() if put.wall_s <= latest]

    def holds(self, job_id: bytes) -> bool:
        """Whether any try of the job has a receipt here. Few are open at a time: a scan is cheaper than a second index."""
        return any(key[0] == job_id for key in self._open)

    @property
    def size(self) -> int:
        """Bytes of the current segment."""
        return self._size

    # --- changes --------------------------------------------------------------------------------------------------------------

    def put(self, receipt: Receipt) -> bool:
        """Writes a receipt; it is in the kernel when this returns. False when the disk refuses (`failed` is then true)."""
        put = Put(receipt, int(self._wall()))
        record = encode_put(receipt, put.wall_s)
        self._open[(receipt.job_id, receipt.fence)] = put
        self._open_bytes += len(record)
        return self._write(record)

    def drop(self, job_id: bytes, fence: int) -> bool:
        """Forgets an acknowledged receipt; False when it was not there. Written with the next put or sync: a lost drop is asked again."""
        put = self._open.pop((job_id, fence), None)
        if put is None:
            return False
        self._open_bytes -= len(encode_put(put.receipt, put.wall_s))
        self._drops += encode_drop((job_id, fence))
        self._soon()
        return True

    def drop_expired(self) -> int:
        """Forgets receipts that nobody can settle any more; returns how many."""
        latest = self._wall() - _KEEP_S
        expired = [key for key, put in self._open.items() if put.wall_s < latest]
        for key in expired:
            self.drop(*key)
        return len(expired)

    def next_session(self) -> int:
        """Counts a new session; the number is on the disk when this returns, since a repeated one would fence the node itself.

        Raises JournalError when it cannot be written. Blocks for one fsync.
        """
        self._counter += 1
        if not self._write(encode_counter(self._counter)):
            raise JournalError(f"the session counter cannot be written to {self._folder}")
        self._fsync()
        return self._counter

    async def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        while (self._dirty or self._drops or self._sync) and not self.failed:
            self._soon()
            if self._sync:
                await asyncio.shield(self._sync)

    def close(self) -> None:
        """Writes what is left and lets the lock go. The journal is not used afterwards."""
        if self._drops:
            self._write(b"")
        with contextlib.suppress(OSError):
            self._fsync()
        os.close(self._file)
        os.close(self._lock)

    # --- files ----------------------------------------------------------------------------------------------------------------

    def _segments(self) -> list[Path]:
        return sorted(
            path for path in self._folder.iterdir() if path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)
        )

    def _recover(self) -> None:
        for path in self._segments():
            for record, _ in scan(path.read_bytes()):
                match record:
                    case Put():
                        self._open[(record.receipt.job_id, record.receipt.fence)] = record
                    case Drop():
                        self._open.pop(record.key, None)
                    case Counter():
                        self._counter = max(self._counter, record.value)

    def _begin_segment(self) -> None:
        """Opens a new segment that starts with all that is open. Older files go once it is on the disk."""
        old = self._segments()
        number = 1 + (int(old[-1].name[len(_PREFIX) : -len(_SUFFIX)]) if old else 0)
        path = self._folder / f"{_PREFIX}{number:012d}{_SUFFIX}"
        puts = b"".join(encode_put(put.receipt, put.wall_s) for put in self._open.values())
        copy = SEGMENT_HEAD + encode_counter(self._counter) + puts
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(file, copy)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        previous, self._file, self._size = getattr(self, "_file", None), file, len(copy)
        if previous is not None:
            os.close(previous)
        self._drops.clear()
        self._open_bytes = len(puts)
        self._old = old
        self._dirty = True

    def _write(self, record: bytes) -> bool:
        """Appends, with the drops that wait. A write that the disk cuts short is cut off again: the file ends with a whole record."""
        data = bytes(self._drops) + record
        try:
            _write_all(self._file, data)
        except OSError:
            self.failed = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            return False
        self.failed = False
        self._drops.clear()
        self._size += len(data)
        self._dirty = True
        self._soon()
        return True

    def _soon(self) -> None:
        """Sees to it that a sync runs; without an event loop (start-up, tests) the caller syncs by itself."""
        if self._sync is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        self._sync = loop.create_task(self._sync_later(), name="journal-sync")

    async def _sync_later(self) -> None:
        try:
            while self._dirty or self._drops:
                await asyncio.sleep(_SYNC_DELAY_S)
                if self._drops and not self._write(b""):
                    return
                if self._size > self._rotate_bytes and self._size > 4 * self._open_bytes:
                    self._begin_segment()
                self._dirty = False
                await asyncio.to_thread(self._fsync)
        except OSError:
            self.failed = True
        finally:
            self._sync = None

    def _fsync(self) -> None:
        """Runs in a thread, or before the loop turns. The descriptor is duplicated, since a new segment may begin meanwhile."""
        old, file = self._old, os.dup(self._file)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        if old:
            _fsync_folder(self._folder)
            for path in old:
                path.unlink(missing_ok=True)
            self._old = [path for path in self._old if path not in old]


def _lock(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise JournalError(f"another node process uses {path.parent}") from None
    return file


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
