"""One blocking gRPC channel, and its errors as MeshError."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from gpumesh_runtime.errors import from_grpc
from gpumesh_runtime.rpc.options import client_options
from gpumesh_runtime.tls import TlsIdentity


def open_channel(target: str, tls: TlsIdentity) -> grpc.Channel:
    """A channel to "host:port". It connects when first used."""
    return grpc.secure_channel(target, tls.channel_credentials(), options=client_options())


@contextmanager
def mesh_errors() -> Iterator[None]:
    """Raises the MeshError that a failed RPC stands for: reason, message, and when to try again."""
    try:
        yield
    except grpc.RpcError as err:
        failed: Any = err  # every RpcError that a call raises is a Call too, with code() and trailing_metadata()
        raise from_grpc(failed) from err
