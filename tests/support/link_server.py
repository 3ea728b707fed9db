"""A real link server for tests: mTLS, AdmissionService/Connect. In this process, or `python -m tests.support.link_server` to be killed."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpumesh.router.v1 import admission_service_pb2_grpc
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.errors import Reason, Unimplemented
from gpumesh_runtime.identity import Identity, service_uri
from gpumesh_runtime.link import SERVICE_LINK, LinkOptions, LinkServer, Receiver
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.tls import TlsIdentity
from tests.support.links import Recorder, echo

METHOD = "/gpumesh.router.v1.AdmissionService/Connect"
Connect = Callable[[Any, Any], Any]


class Certificates:
    """A CA in a folder and the identities that it has issued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = FileCa.load_or_create(folder)

    def service(self, name: str) -> TlsIdentity:
        """Certificate of a service, made on first use."""
        if not (self.folder / f"{name}.crt").exists():
            return self._ca.issue_files(name, service_uri(name))
        return TlsIdentity(self.folder / f"{name}.crt", self.folder / f"{name}.key", self.folder / "ca.crt")


class _Servicer(admission_service_pb2_grpc.AdmissionServiceServicer):
    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # stream methods read through the context
        await self._connect(request_iterator, context)

    def GetTokenizer(self, request: Any, context: Any) -> Any:
        """Not part of links."""
        raise Unimplemented(Reason.UNIMPLEMENTED)

    Authenticate = GetTokenizer


class LinkHost:
    """A router's listener that serves links, or any other streaming function in their place. Async context manager."""

    def __init__(
        self,
        tls: TlsIdentity,
        *,
        receiver: Receiver | None = None,
        welcome: Callable[[bytes, Identity], bytes] = lambda hello, peer: b"welcome " + hello,
        options: LinkOptions = SERVICE_LINK,
        connect: Connect | None = None,
        port: int = 0,
        server_options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        self.receiver = receiver or Recorder(echo)
        self.links = LinkServer(self.receiver, welcome, options)
        self._server = Server("test", f"127.0.0.1:{port}", tls, options=server_options)
        self._server.add(
            _Servicer(connect or self.links.serve), admission_service_pb2_grpc.add_AdmissionServiceServicer_to_server
        )

    async def __aenter__(self) -> "LinkHost":
        await self._server.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self._server.stop(0)

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._server.port}"


class Tunnel:
    """A TCP proxy that can go silent without closing anything, as a path that lost its far end does."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "Tunnel":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *args: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        """host:port of the near end."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def black_hole(self) -> None:
        """Nothing passes any more, in either direction."""
        self._open.clear()

    def heal(self) -> None:
        """It passes again."""
        self._open.set()

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, far_writer]
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.get_running_loop().create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._open.wait()
                target.write(data)
                await target.drain()
        except OSError:
            pass  # cut
        finally:
            target.close()


async def _main(folder: Path, port: int) -> None:
    async with LinkHost(Certificates(folder).service("router"), port=port) as host:
        print("address", host.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2])))
