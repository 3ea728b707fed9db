"""Giving a job to a scheduler: Submit, and the payload's pieces where it does not fit inside."""

from typing import Final

from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh.scheduler.v1.dispatch_service_pb2 import Submit
from gpumesh_runtime.link import FLAG_FIRST, FLAG_LAST, Link

# A payload up to this travels inside Submit, a larger one in pieces (one-request.md 3).
_INLINE_BYTES: Final = 48 * 1024
_PIECE_BYTES: Final = 64 * 1024
# Looking a name up in a protobuf enum costs 0.5 us.
_SUBMIT: Final = ItemKind.ITEM_KIND_SUBMIT
_PAYLOAD: Final = ItemKind.ITEM_KIND_PAYLOAD


def send_submit(link: Link, job_id: bytes, fence: int, submit: Submit, payload: bytes) -> None:
    """Queues Submit and the payload (the OpenAI request body; sensitive). Raises LinkDown."""
    if len(payload) <= _INLINE_BYTES:
        submit.payload = payload
        body = submit.SerializeToString()
        link.send_new(_SUBMIT, id=job_id, fence=fence, flags=FLAG_FIRST | FLAG_LAST, body=body)
        return
    submit.payload_bytes = len(payload)
    link.send_new(_SUBMIT, id=job_id, fence=fence, flags=FLAG_FIRST, body=submit.SerializeToString())
    size = len(payload)
    for seq, start in enumerate(range(0, size, _PIECE_BYTES), 1):
        end = start + _PIECE_BYTES
        flags = FLAG_LAST if end >= size else 0
        link.send(Item(kind=_PAYLOAD, id=job_id, fence=fence, seq=seq, flags=flags, body=payload[start:end]))
