"""The one way to call: a TLS channel with our options, and unary calls that always have a deadline and fail as
MeshError.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import grpc
import grpc.aio

from gpumesh_runtime.error_types import DeadlineExceeded, MeshError, Unavailable
from gpumesh_runtime.errors import from_grpc
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.rpc.options import client_options
from gpumesh_runtime.tls import TlsIdentity

Response = TypeVar("Response")
_FIRST_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 1.0


def channel(
    address: str,
    tls: TlsIdentity,
    *,
    server_name: str = "",
    max_backoff_ms: int = 1_000,
    options: Sequence[tuple[str, str | int]] = (),
) -> grpc.aio.Channel:
    """A channel to "host:port". server_name: the name to expect in the server's certificate where it differs from
    the host.

    Close it (`await channel.close()`); it connects when first used and reconnects by itself.
    """
    chosen = [*options, *client_options(max_backoff_ms)]  # the first of two options of one name counts
    if server_name:
        chosen.append(("grpc.ssl_target_name_override", server_name))
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=chosen)


async def unary(
    method: Callable[..., Awaitable[Response]],
    request: object,
    deadline_s: float,
    *,
    metadata: Sequence[tuple[str, str]] = (),
    attempts: int = 1,
) -> Response:
    """Calls a unary RPC (a method of a generated stub) and gives its response. Raises MeshError; CancelledError
    cancels the RPC.

    deadline_s: for everything together, seconds. attempts: more than 1 only for calls that may be repeated without harm (all of
    ours that carry a caller-made id); a further one follows a failure that is UNAVAILABLE, after full jitter.
    """
    end = time.monotonic() + deadline_s
    backoff = _FIRST_BACKOFF_S
    last: MeshError = DeadlineExceeded(Reason.DEADLINE_EXCEEDED, "No time was left for the call.", retryable=True)
    for number in range(attempts):
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            return await method(request, timeout=left, metadata=tuple(metadata))
        except grpc.aio.AioRpcError as err:
            last = from_grpc(err)
        if not isinstance(last, Unavailable) or number == attempts - 1:
            break
        pause = random.uniform(0, backoff)  # noqa: S311 -- jitter, not a secret
        if time.monotonic() + pause >= end:
            break
        await asyncio.sleep(pause)
        backoff = min(2 * backoff, _MAX_BACKOFF_S)
    raise last
