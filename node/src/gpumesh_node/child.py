"""Child processes beside a live gRPC.

Not asyncio.create_subprocess_exec: uvloop's fork() runs gRPC's fork handlers, which abort the child now and then when gRPC's threads
are busy ("Check failed: next_worker->state == KICKED", seen with grpcio 1.85). subprocess.Popen uses vfork(), which runs none.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Final

from gpumesh_node.hardening import environment_for_children

_POLL_S: Final = 0.1  # where the kernel has no pidfd (macOS)


class Child:
    """`python -m module arguments...` with pipes. stdout, stderr: to be read; what is not read stops the child in the end."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", stdout: asyncio.StreamReader, stderr: asyncio.StreamReader
    ) -> None:
        self.pid = process.pid
        self.stdout = stdout
        self.stderr = stderr
        self._process = process
        self._transports: list[asyncio.ReadTransport] = []

    @classmethod
    async def start(cls, module: str, arguments: Sequence[str] = ()) -> "Child":
        """Starts one, without this process's settings in its environment. Raises OSError."""
        process = subprocess.Popen(  # noqa: ASYNC220, S603 -- vfork takes under 2 ms; our own modules
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment_for_children(),
        )
        assert process.stdout is not None
        assert process.stderr is not None
        child = cls(process, asyncio.StreamReader(), asyncio.StreamReader())
        await child._connect(process.stdout, child.stdout)
        await child._connect(process.stderr, child.stderr)
        return child

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when one ended it."""
        return self._process.poll()

    def write(self, data: bytes) -> None:
        """Writes to its stdin: little enough for a pipe's buffer (64 KiB). Raises OSError when it has gone."""
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), data)

    def close_stdin(self) -> None:
        """Ends its stdin."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        """Ends it now. Harmless when it has ended."""
        self._process.kill()

    async def wait(self) -> int:
        """Its exit code, when it has ended."""
        if self._process.poll() is None:
            try:
                descriptor = os.pidfd_open(self.pid)
            except (AttributeError, OSError):
                while self._process.poll() is None:  # noqa: ASYNC110 -- nobody tells us
                    await asyncio.sleep(_POLL_S)
            else:
                await _readable(descriptor)
        return self._process.wait()  # it has ended: this only collects it

    def close(self) -> None:
        """Gives the pipes back."""
        self.close_stdin()
        for transport in self._transports:
            transport.close()

    async def _connect(self, pipe: IO[bytes], reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        self._transports.append(transport)


async def _readable(descriptor: int) -> None:
    """Until a descriptor is readable; closes it."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
