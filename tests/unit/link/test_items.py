"""The hand-made encoding of items is protobuf's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.common.v1.link_pb2 import Item
from gpumesh_runtime.link.items import encode

_NUMBERS = st.integers(0, 2**64 - 1) | st.integers(0, 5000)


@given(
    kind=st.integers(0, 300),
    id_=st.binary(min_size=16, max_size=16) | st.binary(max_size=20),
    fence=_NUMBERS,
    seq=_NUMBERS,
    tokens=_NUMBERS,
    flags=st.integers(0, 15) | st.integers(0, 2**32 - 1),
    body=st.binary(max_size=64) | st.integers(0, 20_000).map(bytes),
)
def test_an_item_is_encoded_byte_for_byte_as_protobuf_does(
    kind: int, id_: bytes, fence: int, seq: int, tokens: int, flags: int, body: bytes
) -> None:
    item = Item(kind=kind, id=id_, fence=fence, seq=seq, tokens=tokens, flags=flags, body=body)  # type: ignore[arg-type]  # an open enum
    assert encode(kind, id_, fence, seq, tokens, flags, body) == item.SerializeToString()


@pytest.mark.parametrize("number", [-1, 2**64])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_number_out_of_range_is_refused(number: int, place: int) -> None:
    fence, seq, tokens = (number if place == each else 0 for each in range(3))
    with pytest.raises(ValueError, match="range"):
        encode(38, bytes(16), fence, seq, tokens, 0, b"")
