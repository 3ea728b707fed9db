"""RPCs of the directory: the link, and tokenizers in pieces."""

from collections.abc import AsyncIterator
from typing import Any, Final

from gpumesh.registry.v1 import directory_service_pb2 as pb
from gpumesh.registry.v1 import directory_service_pb2_grpc
from gpumesh_registry.directory import DirectoryHub
from gpumesh_registry.domain import checks
from gpumesh_registry.store import Models
from gpumesh_runtime.identity import Identity
from gpumesh_runtime.link import LinkServer

_CHUNK_BYTES: Final = 256 * 1024


class DirectoryServicer(directory_service_pb2_grpc.DirectoryServiceServicer):
    """The directory, for routers, schedulers and metering."""

    def __init__(self, hub: DirectoryHub, models: Models, registry_id: str) -> None:
        self._models = models
        self.links = LinkServer(hub, self._on_hello)
        self._welcome = pb.DirectoryWelcome(registry_id=registry_id).SerializeToString()

    async def Connect(  # type: ignore[override]  # grpc.aio also takes a coroutine that reads and writes through its context
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> None:
        """See the proto."""
        await self.links.serve(request_iterator, context)

    def _on_hello(self, hello: bytes, peer: Identity) -> bytes:
        pb.DirectoryHello.FromString(hello)
        return self._welcome

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        """See the proto."""
        sha256_hex = checks.tokenizer_sha256(request.tokenizer_sha256)
        async for chunk in self._models.read_tokenizer(sha256_hex, _CHUNK_BYTES):
            yield pb.GetTokenizerResponse(chunk=chunk)
