"""tokenizer.json files of the catalogue, fetched from the registry once and kept compressed: a large one has 9 MB."""

import asyncio
import zlib
from collections import OrderedDict
from typing import Final

import grpc

from gpumesh.registry.v1 import directory_service_pb2 as directory_pb2
from gpumesh.registry.v1.directory_service_pb2_grpc import DirectoryServiceStub
from gpumesh_runtime.errors import from_grpc

_MAX_BYTES: Final = 64 * 1024 * 1024
_TIMEOUT_S: Final = 30.0


class Tokenizers:
    """By SHA-256, hex. Least recently used go first when together they exceed 64 MiB compressed."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = DirectoryServiceStub(channel)
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = asyncio.Lock()

    async def get(self, sha256: str) -> bytes:
        """The file. Raises MeshError: NOT_FOUND or the registry is away."""
        async with self._lock:
            kept = self._kept.get(sha256)
            if kept is None:
                kept = await asyncio.to_thread(zlib.compress, await self._fetch(sha256))
                self._kept[sha256] = kept
                while sum(map(len, self._kept.values())) > _MAX_BYTES and len(self._kept) > 1:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(sha256)
        return await asyncio.to_thread(zlib.decompress, kept)

    async def _fetch(self, sha256: str) -> bytes:
        request = directory_pb2.GetTokenizerRequest(tokenizer_sha256=sha256)
        try:
            return b"".join([piece.chunk async for piece in self._stub.GetTokenizer(request, timeout=_TIMEOUT_S)])
        except grpc.aio.AioRpcError as err:
            raise from_grpc(err) from None
