"""A whole registry in this process, on free ports, with a CA of its own and real TLS."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from gpumesh_registry.__main__ import serve
from gpumesh_registry.config import RegistrySettings
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.identity import operator_uri, service_uri
from gpumesh_runtime.lifecycle import Life
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.tls import TlsIdentity

_START_S = 30.0


@dataclass
class RunningRegistry:
    """Addresses of a registry and channels to it."""

    ca: FileCa
    internal: str
    public: str
    life: Life
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    def tls(self, uri: str) -> TlsIdentity:
        """A certificate for an identity, made on first use."""
        stem = uri.removeprefix("spiffe://").replace("/", "_")
        if (self.ca.folder / f"{stem}.crt").exists():
            return TlsIdentity(self.ca.folder / f"{stem}.crt", self.ca.folder / f"{stem}.key", self.ca.ca_file)
        return self.ca.issue_files(stem, uri)

    def channel(self, uri: str) -> grpc.aio.Channel:
        """To the internal listener, as somebody."""
        made = channel(self.internal, self.tls(uri))
        self._channels.append(made)
        return made

    def operator(self) -> grpc.aio.Channel:
        """To the internal listener, as an operator."""
        return self.channel(operator_uri("test"))

    def anyone(self) -> grpc.aio.Channel:
        """To the public listener, without a certificate."""
        made = channel(self.public, TlsIdentity.ca_only(self.ca.ca_file))
        self._channels.append(made)
        return made

    async def close_channels(self) -> None:
        """At the end of the test."""
        for made in self._channels:
            await made.close()


@asynccontextmanager
async def running_registry(dsn: str, folder: Path, name: str = "registry") -> AsyncIterator[RunningRegistry]:
    """Starts a registry on a database and drains it afterwards. Several may share folder (the CA) and database."""
    ca = FileCa.load_or_create(folder / "ca")
    identity = ca.issue_files(name, service_uri("registry"))
    ready_file = folder / f"{name}.ready"
    settings = RegistrySettings.read(
        database_url=dsn,
        internal_address="127.0.0.1:0",
        public_address="127.0.0.1:0",
        ca_dir=ca.folder,
        scheduler_addresses=("scheduler.test:1",),
        tls_cert=identity.cert_file,
        tls_key=identity.key_file,
        tls_ca=identity.ca_file,
        ready_file=ready_file,
        drain_s=1.0,
    )
    life = Life(settings, name)
    process = asyncio.create_task(serve(life, settings), name=name)
    try:
        async with asyncio.timeout(_START_S):
            while not ready_file.exists():
                if process.done():
                    await process
                await asyncio.sleep(0.01)
        ports = json.loads(ready_file.read_text())
        running = RunningRegistry(ca, f"localhost:{ports['port']}", f"localhost:{ports['public_port']}", life)
        try:
            yield running
        finally:
            await running.close_channels()
    finally:
        life.stop("test")
        await process
        life.remove_ready_file()
        await life.supervise(_nothing)


async def _nothing(_life: Life) -> None:
    """Lets Life cancel what it spawned, as at the end of a process."""
