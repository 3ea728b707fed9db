"""The queue's order, pacing and bounds, without a loop: time is a number."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.common.v1.link_pb2 import Batch, Item
from gpumesh_runtime.link.items import FRAME_OVERHEAD_BYTES, frame, prefix, rendered_bytes
from gpumesh_runtime.link.options import NODE_LINK, SERVICE_LINK, LinkOptions
from gpumesh_runtime.link.send_queue import NEVER, PLAIN, RIDES, URGENT, SendQueue

A, B = b"a" * 16, b"b" * 16


def encoded(kind: int, id_: bytes = A, seq: int = 0, size: int = 10) -> bytes:
    return frame(Item(kind=kind, id=id_, seq=seq, body=b"x" * size).SerializeToString())  # type: ignore[arg-type]  # any int is a valid open enum value


def data(
    queue: SendQueue, id_: bytes = A, seq: int = 0, *, urgent: bool = False, last: bool = False, size: int = 10
) -> int:
    return queue.push_data(id_, encoded(38, id_, seq, size), urgent, last)


def kinds(message: bytes | None) -> list[int]:
    assert message is not None
    return [item.kind for item in Batch.FromString(message).items]


def seqs(message: bytes | None) -> list[int]:
    assert message is not None
    return [item.seq for item in Batch.FromString(message).items]


def queue_that_sent_data_at(now: float, options: LinkOptions = SERVICE_LINK) -> SendQueue:
    queue = SendQueue(options)
    data(queue)
    assert queue.take(now) is not None
    return queue


def test_a_message_is_the_encoding_of_a_batch() -> None:
    queue = SendQueue(SERVICE_LINK)
    items = [Item(kind=38, id=A, seq=n, body=b"x" * size) for n, size in enumerate((0, 5, 100, 200, 20_000))]  # type: ignore[arg-type]  # any int is a valid open enum value
    for item in items:
        queue.push_data(A, frame(item.SerializeToString()), False, False)
    message = queue.take(0.0)
    assert message == Batch(items=items).SerializeToString()
    assert queue.taken_items == 5
    assert queue.empty
    assert queue.queued_bytes == 0


def test_prefixes_are_right_at_every_length_of_the_varint() -> None:
    for size in (0, 127, 128, 4095, 4096, 16_383, 16_384, 2_097_151, 2_097_152):
        value, shift = 0, 0
        for byte in prefix(size)[1:]:
            value |= (byte & 0x7F) << shift
            shift += 7
        assert value == size


def test_data_goes_at_once_when_nothing_was_sent_for_4_ms() -> None:
    queue = queue_that_sent_data_at(10.0)
    assert data(queue) == PLAIN
    assert queue.take(10.005) is not None


def test_data_is_held_until_4_ms_after_the_last_data_message() -> None:
    queue = queue_that_sent_data_at(10.0)
    data(queue)
    assert queue.take(10.003) is None
    at, level = queue.due()
    assert at == pytest.approx(10.004)
    assert level == URGENT
    assert queue.take(at) is not None


def test_a_first_or_last_item_is_never_held_and_takes_what_waits_before_it_along() -> None:
    queue = queue_that_sent_data_at(10.0)
    data(queue, A, 1)
    assert queue.take(10.001) is None
    assert data(queue, B, 2, urgent=True) == URGENT
    data(queue, A, 3)
    assert seqs(queue.take(10.001)) == [1, 2, 3]


def test_a_full_message_is_never_held() -> None:
    queue = queue_that_sent_data_at(10.0, NODE_LINK)
    levels = [data(queue, A, n) for n in range(NODE_LINK.max_items)]
    assert levels[-2:] == [PLAIN, URGENT]
    assert queue.take(10.0) is not None


def test_control_goes_at_once_and_ahead_of_data() -> None:
    queue = queue_that_sent_data_at(10.0)
    data(queue, seq=1)
    assert queue.push_control(encoded(5)) == URGENT
    assert kinds(queue.take(10.0)) == [5, 38]


def test_control_does_not_share_a_message_with_much_data() -> None:
    queue = SendQueue(SERVICE_LINK)
    data(queue, size=100_000)
    queue.push_control(encoded(5))
    assert kinds(queue.take(0.0)) == [5]
    assert kinds(queue.take(0.0)) == [38]


def test_background_rides_with_the_next_message() -> None:
    queue = SendQueue(SERVICE_LINK)
    assert queue.push_background(encoded(66), 10.0) == RIDES
    assert queue.take(10.01) is None
    data(queue)
    assert kinds(queue.take(10.01)) == [38, 66]
    assert queue.due() == (NEVER, RIDES)


def test_background_waits_50_ms_at_most() -> None:
    queue = SendQueue(SERVICE_LINK)
    queue.push_background(encoded(66), 10.0)
    queue.push_background(encoded(67), 10.04)
    at, level = queue.due()
    assert at == pytest.approx(10.05)
    assert level == PLAIN
    assert queue.take(10.049) is None
    assert kinds(queue.take(10.05)) == [66, 67]


def test_full_messages_of_data_do_not_starve_background() -> None:
    queue = SendQueue(NODE_LINK)
    for n in range(1000):
        data(queue, A, n, size=1000)
    for _ in range(100):
        queue.push_background(encoded(66, size=1000), 10.0)
    assert 66 not in kinds(queue.take(10.04)), "it has time yet"
    taken = [kinds(queue.take(10.05)).count(66) for _ in range(8)]
    assert taken == [16, 16, 16, 16, 16, 16, 4, 0]


def test_messages_stay_within_bytes_and_items() -> None:
    queue = SendQueue(NODE_LINK)
    for n in range(40):
        data(queue, A, n, size=8000)
    sizes = []
    while not queue.empty:
        message = queue.take(queue.due()[0])
        assert message is not None
        sizes.append(len(message))
    assert max(sizes) <= NODE_LINK.max_message_bytes
    for n in range(600):
        data(queue, A, n, size=0)
    counts: list[int] = []
    while not queue.empty:
        queue.take(queue.due()[0])
        counts.append(queue.taken_items)
    assert counts == [256, 256, 88]


def test_an_item_larger_than_a_message_travels_alone() -> None:
    queue = SendQueue(NODE_LINK)
    data(queue, A, 1)
    data(queue, A, 2, size=100_000)
    data(queue, A, 3)
    assert [seqs(queue.take(now)) for now in (1.0, 2.0, 3.0)] == [[1], [2], [3]]


def test_an_id_over_its_bound_is_refused_and_others_are_not() -> None:
    queue = SendQueue(replace(SERVICE_LINK, queue_id_bytes=1000))
    assert data(queue, A, size=900) == PLAIN
    assert data(queue, A, size=100) == -1
    assert data(queue, B, size=900) == PLAIN
    assert queue.bytes_of(A) == len(encoded(38, A, 0, 900))


def test_all_ids_together_are_bounded() -> None:
    queue = SendQueue(replace(SERVICE_LINK, queue_data_bytes=2500))
    assert [data(queue, bytes([n]) * 16, size=900) for n in range(3)] == [PLAIN, PLAIN, -1]


def test_drop_takes_out_one_id_and_frees_its_bytes() -> None:
    queue = SendQueue(SERVICE_LINK)
    for n in range(10):
        data(queue, (A, B)[n % 2], n)
    before = queue.bytes_of(B)
    assert queue.drop(A) == 5
    assert queue.bytes_of(A) == 0
    assert queue.data_bytes == queue.bytes_of(B) == before
    assert seqs(queue.take(0.0)) == [1, 3, 5, 7, 9]
    assert queue.drop(A) == 0


def test_drop_may_leave_the_last_item() -> None:
    queue = queue_that_sent_data_at(10.0)
    data(queue, A, 1)
    data(queue, A, 2, urgent=True, last=True)
    assert queue.drop(A, keep_last=True) == 1
    assert seqs(queue.take(10.0)) == [2]
    assert queue.queued_bytes == 0


def test_rendered_bytes_count_a_frame_as_body_and_256() -> None:
    assert rendered_bytes(Item(body=b"12345")) == 5 + FRAME_OVERHEAD_BYTES


Op = st.one_of(
    st.tuples(st.just("data"), st.integers(0, 3), st.booleans(), st.integers(0, 3000)),
    st.tuples(st.just("control"), st.integers(0, 3), st.booleans(), st.integers(0, 50)),
    st.tuples(st.just("background"), st.integers(0, 3), st.booleans(), st.integers(0, 300)),
    st.tuples(st.just("drop"), st.integers(0, 3), st.booleans(), st.just(0)),
    st.tuples(st.just("take"), st.integers(0, 60), st.booleans(), st.just(0)),
)


@given(st.lists(Op, max_size=80))
def test_whatever_happens_bytes_add_up_order_per_id_holds_and_all_comes_out(
    ops: list[tuple[str, int, bool, int]],
) -> None:
    options = replace(NODE_LINK, max_message_bytes=4096, max_items=8, queue_id_bytes=20_000, queue_data_bytes=40_000)
    queue = SendQueue(options)
    ids = [bytes([n]) * 16 for n in range(4)]
    expected: dict[bytes, list[int]] = {id_: [] for id_ in ids}
    got: dict[bytes, list[int]] = {id_: [] for id_ in ids}
    others = {"control": 0, "background": 0}
    now, came = 0.0, 0

    def take() -> bool:
        nonlocal came
        message = queue.take(now)
        if message is None:
            return False
        items = Batch.FromString(message).items
        assert len(items) == queue.taken_items <= options.max_items
        assert len(message) <= options.max_message_bytes or len(items) == 1
        classes = [0 if item.kind < 32 else 1 if item.kind < 64 else 2 for item in items]
        assert classes == sorted(classes)
        for item in items:
            if 32 <= item.kind < 64:
                got[item.id].append(item.seq)
            else:
                came += 1
        return True

    for seq, (op, number, flag, size) in enumerate(ops, 1):
        if op == "data":
            id_ = ids[number]
            if data(queue, id_, seq, urgent=flag, size=size) >= 0:
                expected[id_].append(seq)
        elif op == "control":
            others["control"] += queue.push_control(encoded(5, size=size)) >= 0
        elif op == "background":
            others["background"] += queue.push_background(encoded(66, size=size), now) >= 0
        elif op == "drop":
            id_ = ids[number]
            queue.drop(id_)
            expected[id_] = list(got[id_])
        else:
            now += number / 1000
            take()
        assert sum(queue.bytes_of(id_) for id_ in ids) == queue.data_bytes
        assert (
            queue.queued_bytes
            <= options.queue_data_bytes + options.queue_control_bytes + options.queue_background_bytes
        )
    for _ in range(200):
        at, _ = queue.due()
        if queue.empty:
            break
        now = max(now, at)
        assert take(), "what is due can be taken"
    assert got == expected
    assert came == sum(others.values())
    assert queue.queued_bytes == 0
