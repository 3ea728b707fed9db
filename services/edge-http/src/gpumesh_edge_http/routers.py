"""What the edge asks routers by hand, off the path of requests: tokenizer.json files, once each, and whose a key is."""

from collections.abc import Sequence
from typing import Final

import grpc

from gpumesh.router.v1.admission_service_pb2 import AuthenticateRequest, GetTokenizerRequest
from gpumesh.router.v1.admission_service_pb2_grpc import AdmissionServiceStub
from gpumesh_dispatch.api_key import ApiKey
from gpumesh_runtime.errors import DeadlineExceeded, MeshError, Reason, Unavailable, from_grpc
from gpumesh_runtime.rpc.client import channel, unary
from gpumesh_runtime.tls import TlsIdentity

_TIMEOUT_S: Final = 30.0
_AUTHENTICATE_S: Final = 5.0
_MAX_BYTES: Final = 64 << 20


class Routers:
    """Asks one router after the other."""

    def __init__(self, addresses: Sequence[str], tls: TlsIdentity | None) -> None:
        self._addresses = addresses
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def fetch(self, sha256: str) -> bytes:
        """The file. Raises MeshError: NOT_FOUND, or none of the routers answered."""
        last = Unavailable(Reason.ROUTER_UNAVAILABLE, "No router could be asked for a tokenizer.")
        if self._tls is None:
            raise last
        for address in self._addresses:
            try:
                return await self._read(AdmissionServiceStub(self._channel(address)), sha256)
            except grpc.aio.AioRpcError as err:
                last = Unavailable(Reason.ROUTER_UNAVAILABLE, from_grpc(err).message)
        raise last

    async def authenticate(self, key: ApiKey) -> None:
        """Raises MeshError: the key is wrong or revoked, its account suspended, or none of the routers answered."""
        last: MeshError = Unavailable(
            Reason.ROUTER_UNAVAILABLE, "No router could be asked about the API key. Try again."
        )
        if self._tls is None:
            raise last
        request = AuthenticateRequest(key_id=key.key_id, key_sha256=key.sha256)
        for address in self._addresses:
            try:
                await unary(AdmissionServiceStub(self._channel(address)).Authenticate, request, _AUTHENTICATE_S)
            except (Unavailable, DeadlineExceeded) as err:
                last = err
            else:
                return
        raise last

    def _channel(self, address: str) -> grpc.aio.Channel:
        """Opened when first needed, kept until close()."""
        assert self._tls is not None
        kept = self._channels.get(address)
        if kept is None:
            kept = self._channels[address] = channel(address, self._tls)
        return kept

    async def close(self) -> None:
        """Ends all channels."""
        for kept in self._channels.values():
            await kept.close()

    async def _read(self, stub: AdmissionServiceStub, sha256: str) -> bytes:
        body = bytearray()
        async for piece in stub.GetTokenizer(GetTokenizerRequest(tokenizer_sha256=sha256), timeout=_TIMEOUT_S):
            body += piece.chunk
            if len(body) > _MAX_BYTES:
                raise Unavailable(Reason.ROUTER_UNAVAILABLE, "The tokenizer is larger than expected.")
        return bytes(body)
