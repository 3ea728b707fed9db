"""What both ends of a stream share: the read loop, the exceptions of a broken stream, and the first message."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Batch, Item
from gpumesh_runtime.link.items import frame
from gpumesh_runtime.link.link import Link

# All that grpc.aio raises from read() and write() of a stream that has ended or broken.
BROKEN: Final = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, OSError)
Read = Callable[[], Awaitable[Any]]  # a Batch, or grpc.aio.EOF


async def read_until_end(link: Link, read: Read) -> None:
    """Delivers every message until the stream ends, then says how it ended. After the link's own end it only drains the stream."""
    eof = grpc.aio.EOF
    deliver = link.deliver
    try:
        while (batch := await read()) is not eof:
            if link.end is None:
                deliver(batch)
    except DecodeError:
        link.protocol_error()
    except BROKEN:
        pass  # its end without Goodbye is what matters; lost() says so
    finally:
        link.lost()


def single(kind: int, body: bytes) -> bytes:
    """A message of one item, as bytes."""
    return frame(Item(kind=kind, body=body).SerializeToString())  # type: ignore[arg-type]  # any int is a valid open enum value


def first_item(batch: Any, kind: int) -> Item | None:
    """The handshake item that a first message must begin with; None when it does not."""
    if not isinstance(batch, Batch) or not batch.items or batch.items[0].kind != kind:
        return None
    return batch.items[0]


async def stop_task(task: "asyncio.Task[None]") -> None:
    """Cancels a task of ours and waits for its end. Passes on a cancellation of the waiter."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
