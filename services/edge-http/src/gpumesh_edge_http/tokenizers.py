"""tokenizer.json files from a router, one RPC per file, once."""

from collections.abc import Sequence
from typing import Final

import grpc

from gpumesh.router.v1.admission_service_pb2 import GetTokenizerRequest
from gpumesh.router.v1.admission_service_pb2_grpc import AdmissionServiceStub
from gpumesh_runtime.errors import Reason, Unavailable, from_grpc
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.tls import TlsIdentity

_TIMEOUT_S: Final = 30.0
_MAX_BYTES: Final = 64 << 20


class RouterTokenizers:
    """Asks one router after the other."""

    def __init__(self, addresses: Sequence[str], tls: TlsIdentity | None) -> None:
        self._addresses = addresses
        self._tls = tls

    async def fetch(self, sha256: str) -> bytes:
        """The file. Raises MeshError: NOT_FOUND, or none of the routers answered."""
        last = Unavailable(Reason.ROUTER_UNAVAILABLE, "No router could be asked for a tokenizer.")
        if self._tls is None:
            raise last
        for address in self._addresses:
            link = channel(address, self._tls)
            try:
                return await self._read(AdmissionServiceStub(link), sha256)
            except grpc.aio.AioRpcError as err:
                last = Unavailable(Reason.ROUTER_UNAVAILABLE, from_grpc(err).message)
            finally:
                await link.close()
        raise last

    async def _read(self, stub: AdmissionServiceStub, sha256: str) -> bytes:
        body = bytearray()
        async for piece in stub.GetTokenizer(GetTokenizerRequest(tokenizer_sha256=sha256), timeout=_TIMEOUT_S):
            body += piece.chunk
            if len(body) > _MAX_BYTES:
                raise Unavailable(Reason.ROUTER_UNAVAILABLE, "The tokenizer is larger than expected.")
        return bytes(body)
