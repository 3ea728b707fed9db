"""Two links joined in memory, on virtual time: what callers and receivers see."""

import asyncio
from dataclasses import replace

import pytest

from gpumesh.common.v1.link_pb2 import Cancel, Failure, Item
from gpumesh_runtime.errors import DeadlineExceeded, MeshError, NotFound, PayloadTooLarge, Reason, ResourceExhausted
from gpumesh_runtime.link import (
    FLAG_FIRST,
    FLAG_LAST,
    NODE_LINK,
    SERVICE_LINK,
    Link,
    LinkEnd,
    fence,
    new_id,
)
from tests.support.links import (
    CANCEL,
    DONE,
    ERROR,
    FRAME,
    PAYLOAD,
    SETTLE,
    SUBMIT,
    Pair,
    Recorder,
    echo,
    virtual,
)

JOB = b"j" * 16
OTHER = b"o" * 16


def test_a_call_gets_its_answer() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder(echo)) as pair:
            assert await pair.left.call(b"ping", 1.0) == b"ping"
            assert pair.left.stats.messages_out == pair.left.stats.messages_in == 1

    virtual(main())


def test_a_call_by_callback_gets_its_answer_or_its_error() -> None:
    async def main() -> None:
        answers: list[tuple[bytes | None, MeshError | None]] = []
        async with Pair(Recorder(), Recorder(echo)) as pair:
            pair.left.ask(b"ping", 1.0, lambda body, error: answers.append((body, error)))
            await pair.left.call(b"", 1.0)
            pair.right.finish(LinkEnd.LOST)
            pair.left.ask(b"ping", 1.0, lambda body, error: answers.append((body, error)))
            await asyncio.sleep(2.0)
        assert answers[0] == (b"ping", None)
        assert isinstance(answers[1][1], DeadlineExceeded)

    virtual(main())


def test_an_error_raised_while_serving_reaches_the_caller_with_its_reason() -> None:
    def refuse(link: Link, item: Item) -> None:
        raise NotFound(Reason.UNKNOWN_MODEL, "no such model", metadata={"near": "gpumesh-tiny"})

    async def main() -> None:
        async with Pair(Recorder(), Recorder(refuse)) as pair:
            with pytest.raises(NotFound) as caught:
                await pair.left.call(b"", 1.0)
            assert caught.value.reason is Reason.UNKNOWN_MODEL
            assert caught.value.metadata == {"near": "gpumesh-tiny"}
            assert pair.right.end is None, "the link lives on"

    virtual(main())


def test_a_call_past_its_deadline_fails_and_is_cancelled_at_the_other_side() -> None:
    async def main() -> None:
        right = Recorder()
        async with Pair(Recorder(), right) as pair:
            began = asyncio.get_running_loop().time()
            with pytest.raises(DeadlineExceeded):
                await pair.left.call(b"", 3.0, id=JOB)
            assert asyncio.get_running_loop().time() - began == pytest.approx(3.0, abs=0.02)
            await right.until(lambda: pair.right.is_cancelled(JOB))
            assert Cancel.FromString(right.of_kind(CANCEL)[0].body).reason == "DEADLINE_EXCEEDED"

    virtual(main())


def test_calls_with_unlike_deadlines_each_end_at_their_own() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder()) as pair:
            loop = asyncio.get_running_loop()
            began, ends = loop.time(), list[float]()
            calls = [pair.left.call(b"", timeout_s) for timeout_s in (5.0, 1.0, 3.0)]
            for call in calls:
                call.add_done_callback(lambda _: ends.append(loop.time() - began))
            await asyncio.gather(*calls, return_exceptions=True)
            await asyncio.sleep(0)
            assert ends == pytest.approx([1.0, 3.0, 5.0], abs=0.02)

    virtual(main())


def test_what_is_sent_in_one_turn_shares_a_message() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder(echo)) as pair:
            await asyncio.gather(*(pair.left.call(b"", 1.0) for _ in range(100)))
            assert pair.left.stats.messages_out == 1
            assert pair.right.stats.messages_out == 1

    virtual(main())


def test_frames_are_paced_when_busy_and_first_and_last_are_not() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder()) as pair:
            loop = asyncio.get_running_loop()
            began = loop.time()
            pair.left.send_new(FRAME, id=JOB, seq=1, flags=FLAG_FIRST)
            await asyncio.sleep(0.001)
            pair.left.send_new(FRAME, id=JOB, seq=2)
            await asyncio.sleep(0.001)
            pair.left.send_new(FRAME, id=JOB, seq=3)
            await asyncio.sleep(0.003)
            pair.left.send_new(FRAME, id=JOB, seq=4, flags=FLAG_LAST)
            await pair.left.drained()
            times = [sent - began for sent in pair.out.sent_at]
            assert times == pytest.approx([0.0, 0.004, 0.005], abs=0.0005)
            assert [[item.seq for item in batch.items] for batch in pair.out.batches()] == [[1], [2, 3], [4]]

    virtual(main())


def test_one_request_at_a_time_is_never_held() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder(echo)) as pair:
            began = asyncio.get_running_loop().time()
            for _ in range(50):
                await pair.left.call(b"", 1.0)
            assert asyncio.get_running_loop().time() == began, "fifty round trips, no timer"

    virtual(main())


def test_background_waits_for_company_50_ms_at_most() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder()) as pair:
            began = asyncio.get_running_loop().time()
            pair.left.send_new(SETTLE, id=JOB)
            await pair.left.drained()
            assert pair.out.sent_at[0] - began == pytest.approx(0.05, abs=0.001)

    virtual(main())


def test_a_cancel_overtakes_10_mb_of_queued_data_and_leaves_no_zombie() -> None:
    async def main() -> None:
        right = Recorder()
        async with Pair(Recorder(), right) as pair:
            pair.out.stall()
            pair.left.send_new(SUBMIT, id=OTHER, flags=FLAG_FIRST)
            for _ in range(5):  # the writer is now stuck in a write
                await asyncio.sleep(0)
            pair.left.send_new(SUBMIT, id=JOB, flags=FLAG_FIRST)
            for seq in range(1, 161):
                pair.left.send_new(PAYLOAD, id=JOB, seq=seq, body=bytes(64 * 1024))
            pair.left.send_new(PAYLOAD, id=OTHER, seq=1, flags=FLAG_LAST)
            assert pair.left.queued_bytes(JOB) > 10 * 1024 * 1024
            pair.left.cancel(JOB, "CLIENT_GONE")
            assert pair.left.queued_bytes(JOB) == 0
            assert pair.left.stats.cancelled_items == 161
            pair.out.resume()
            await pair.left.drained()
            await right.until(lambda: len(right.items) == 3)
            assert [(item.kind, item.id) for item in right.items] == [(SUBMIT, OTHER), (CANCEL, JOB), (PAYLOAD, OTHER)]
            # A Submit that took another way and comes after its Cancel.
            pair.left.send_new(SUBMIT, id=JOB, flags=FLAG_FIRST)
            pair.left.send_new(SUBMIT, id=b"n" * 16, flags=FLAG_FIRST)
            await right.until(lambda: len(right.items) == 4)
            assert right.items[3].id == b"n" * 16
            assert pair.right.stats.zombies_dropped == 1

    virtual(main())


def test_a_cancel_of_one_attempt_does_not_stop_the_next() -> None:
    async def main() -> None:
        right = Recorder()
        async with Pair(Recorder(), right) as pair:
            pair.left.cancel(JOB, "FIRST_TOKEN_TIMEOUT", fence=fence(1, 0))
            pair.left.send_new(SUBMIT, id=JOB, fence=fence(2, 0), flags=FLAG_FIRST)
            await right.until(lambda: len(right.items) == 2)
            assert pair.right.is_cancelled(JOB, fence(1, 0))
            assert not pair.right.is_cancelled(JOB, fence(2, 0))
            await asyncio.sleep(61)
            assert not pair.right.is_cancelled(JOB, fence(1, 0))

    virtual(main())


def test_a_cancel_that_arrives_drops_what_is_queued_for_it_here_but_not_its_end() -> None:
    async def main() -> None:
        left, right = Recorder(), Recorder()
        async with Pair(left, right) as pair:
            pair.back.stall()
            pair.right.send_new(FRAME, id=OTHER, seq=1, flags=FLAG_FIRST)
            for _ in range(5):
                await asyncio.sleep(0)
            for seq in range(1, 100):
                pair.right.send_new(FRAME, id=JOB, seq=seq)
            pair.right.send_new(DONE, id=JOB, seq=99, flags=FLAG_LAST)
            pair.left.cancel(JOB, "CLIENT_GONE")
            await right.until(lambda: pair.right.is_cancelled(JOB))
            pair.back.resume()
            await left.until(lambda: bool(left.of_kind(DONE)))
            assert [item.id for item in left.of_kind(FRAME)] == [OTHER]

    virtual(main())


def test_overflow_ends_the_id_with_a_named_reason_and_not_the_link() -> None:
    async def main() -> None:
        left, right = Recorder(), Recorder()
        async with Pair(left, right, replace(SERVICE_LINK, queue_id_bytes=10_000)) as pair:
            pair.left.send_new(FRAME, id=JOB, seq=1, flags=FLAG_FIRST)
            await right.until(lambda: len(right.items) == 1)
            pair.out.stall()
            pair.left.send_new(FRAME, id=OTHER, seq=1, flags=FLAG_FIRST)
            for seq in range(2, 30):
                pair.left.send_new(FRAME, id=JOB, seq=seq, fence=fence(1, 1), body=bytes(1000))
            assert pair.left.queued_total_bytes < 1000, "what was queued for it is gone"
            pair.out.resume()
            await left.until(lambda: left.overflows == [JOB])
            await right.until(lambda: bool(right.of_kind(ERROR)))
            assert Failure.FromString(right.of_kind(ERROR)[0].body).reason == "SEND_QUEUE_FULL"
            assert [item.id for item in right.of_kind(FRAME)] == [JOB, OTHER]
            assert pair.left.end is None
            assert pair.left.stats.overflows == 1
            pair.left.send_new(FRAME, id=JOB, seq=1, fence=fence(2, 1), flags=FLAG_FIRST)
            await right.until(lambda: right.items[-1].fence == fence(2, 1))

    virtual(main())


def test_overflow_of_a_request_cancels_it_and_of_a_call_fails_it() -> None:
    async def main() -> None:
        right = Recorder()
        async with Pair(Recorder(), right, replace(SERVICE_LINK, queue_id_bytes=10_000)) as pair:
            pair.out.stall()
            for seq in range(1, 12):
                pair.left.send_new(PAYLOAD, id=JOB, seq=seq, body=bytes(1000))
            with pytest.raises(ResourceExhausted) as caught:
                await pair.left.call(bytes(20_000), 1.0)
            assert caught.value.reason is Reason.SEND_QUEUE_FULL
            pair.out.resume()
            await right.until(lambda: pair.right.is_cancelled(JOB))
            assert Cancel.FromString(right.of_kind(CANCEL)[0].body).reason == "SEND_QUEUE_FULL"

    virtual(main())


def test_memory_is_bounded_whatever_is_sent_to_a_reader_that_stalls() -> None:
    async def main() -> None:
        options = replace(
            NODE_LINK, queue_data_bytes=200_000, queue_background_bytes=50_000, queue_control_bytes=50_000
        )
        async with Pair(Recorder(), Recorder(), options) as pair:
            pair.out.stall()
            for seq in range(500):
                pair.left.send_new(FRAME, id=seq.to_bytes(16, "big"), body=bytes(1000))
                pair.left.send_new(SETTLE, id=JOB, body=bytes(1000))
                assert pair.left.queued_total_bytes <= 300_000
            while pair.left.end is None:  # a flood of ids, all of which overflow, ends the link at last
                pair.left.send_new(FRAME, id=new_id(), body=bytes(1000))
                assert pair.left.queued_total_bytes <= 300_000

    virtual(main())


def test_an_item_over_its_bound_is_refused_to_the_sender() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder(), NODE_LINK) as pair:
            with pytest.raises(PayloadTooLarge):
                pair.left.send_new(FRAME, id=JOB, body=bytes(NODE_LINK.max_item_bytes))

    virtual(main())
