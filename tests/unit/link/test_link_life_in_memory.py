"""How links end, live and defend themselves: in memory, on virtual time."""

import asyncio

import pytest

from gpumesh.common.v1.link_pb2 import Batch, Failure, Item
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.link import (
    Link,
    LinkDown,
    LinkEnd,
    LinkProtocolError,
    Window,
    fence,
    new_id,
)
from tests.support.links import (
    CALL,
    FRAME,
    HEARTBEAT,
    SETTLE,
    WINDOW,
    Pair,
    Recorder,
    echo,
    virtual,
)

JOB = b"j" * 16
OTHER = b"o" * 16


def test_goodbye_then_the_end_of_the_stream_is_goodbye_and_without_it_lost() -> None:
    async def main() -> None:
        for polite, end in ((True, LinkEnd.GOODBYE), (False, LinkEnd.LOST)):
            left = Recorder()
            async with Pair(left, Recorder()) as pair:
                if polite:
                    pair.right.goodbye(drain_ms=500)
                    await left.until(lambda left=left: bool(left.goodbyes))  # type: ignore[misc]  # a default argument binds the loop variable
                    assert pair.left.draining
                    assert left.goodbyes[0].drain_ms == 500
                await pair.back.end()
                await left.until(lambda left=left: bool(left.ends))  # type: ignore[misc]  # a default argument binds the loop variable
                assert left.ends == [end]

    virtual(main())


def test_closing_says_goodbye_after_everything_queued() -> None:
    async def main() -> None:
        left, right = Recorder(), Recorder()
        async with Pair(left, right) as pair:
            for seq in range(1, 1000):
                pair.left.send_new(FRAME, id=JOB, seq=seq)
            pair.left.send_new(SETTLE, id=JOB)
            await pair.left.close()
            await right.until(lambda: bool(right.goodbyes) and len(right.items) == 1000)
            assert left.ends == [LinkEnd.CLOSED_BY_US]
            with pytest.raises(LinkDown):
                pair.left.send_new(FRAME, id=JOB)
            pair.left.reply(JOB, b"")  # nobody waits there: nothing happens
            pair.left.cancel(JOB, "CLIENT_GONE")

    virtual(main())


def test_closing_a_link_whose_peer_does_not_read_takes_2_s_and_no_more() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder()) as pair:
            pair.out.stall()
            pair.left.send_new(FRAME, id=JOB)
            began = asyncio.get_running_loop().time()
            await pair.left.close()
            assert asyncio.get_running_loop().time() - began == pytest.approx(2.0)

    virtual(main())


def test_a_broken_link_fails_what_waits_before_it_tells_of_its_end() -> None:
    async def main() -> None:
        order: list[str] = []

        class Watching(Recorder):
            def on_down(self, link: Link, end: LinkEnd) -> None:
                order.append("down")

        async with Pair(Watching(), Recorder()) as pair:
            future = pair.left.call(b"", 60.0)
            pair.left.ask(b"", 60.0, lambda body, error: order.append(type(error).__name__))
            await pair.left.drained()
            await pair.back.end()
            with pytest.raises(LinkDown):
                await future
        assert order == ["LinkDown", "down"]

    virtual(main())


def test_idle_links_beat_and_live() -> None:
    async def main() -> None:
        left, right = Recorder(), Recorder()
        async with Pair(left, right) as pair:
            await asyncio.sleep(3600)
            assert pair.left.end is pair.right.end is None
            assert 300 <= pair.left.stats.messages_out <= 450
            assert not left.suspicions
            assert not left.items, "an empty heartbeat is consumed"

    virtual(main())


def test_a_side_that_sends_anyway_needs_no_heartbeats() -> None:
    async def main() -> None:
        async with Pair(Recorder(), Recorder()) as pair:
            for _ in range(100):
                pair.left.send_new(FRAME, id=JOB)
                await asyncio.sleep(5)
            assert {item.kind for batch in pair.out.batches() for item in batch.items} == {FRAME}

    virtual(main())


def test_heartbeats_with_a_body_go_at_their_interval_whatever_else_is_sent() -> None:
    async def main() -> None:
        right = Recorder()
        async with Pair(Recorder(), right) as pair:
            pair.left.heartbeat_body = lambda: b"status"
            for _ in range(100):
                pair.left.send_new(FRAME, id=JOB)
                await asyncio.sleep(1)
            beats = right.of_kind(HEARTBEAT)
            assert 7 <= len(beats) <= 13
            assert beats[0].body == b"status"

    virtual(main())


def test_a_black_holed_peer_is_suspect_after_15_s_and_lost_after_25_s() -> None:
    async def main() -> None:
        left = Recorder()
        async with Pair(left, Recorder()) as pair:
            began = asyncio.get_running_loop().time()
            pair.back.swallow()
            await left.until(lambda: bool(left.suspicions), 60)
            assert pair.left.suspect
            assert asyncio.get_running_loop().time() - began == pytest.approx(15.0, abs=0.1)
            await left.until(lambda: bool(left.ends), 60)
            assert asyncio.get_running_loop().time() - began == pytest.approx(25.0, abs=0.1)
            assert left.ends == [LinkEnd.LOST]

    virtual(main())


def test_any_message_ends_suspicion() -> None:
    async def main() -> None:
        left = Recorder()
        async with Pair(left, Recorder()) as pair:
            pair.back.stall()
            await left.until(lambda: left.suspicions == [True], 60)
            pair.back.resume()
            await left.until(lambda: left.suspicions == [True, False], 60)
            assert not pair.left.suspect
            assert pair.left.end is None

    virtual(main())


def test_a_peer_that_beats_but_never_reads_is_lost_after_25_s() -> None:
    async def main() -> None:
        left = Recorder()
        async with Pair(left, Recorder()) as pair:
            pair.out.stall()
            pair.left.send_new(FRAME, id=JOB)
            while pair.right.end is None:  # it hears nothing either, and gives up in its turn
                pair.right.send_new(FRAME, id=JOB)
                await asyncio.sleep(1)
            await left.until(lambda: left.ends == [LinkEnd.LOST], 15)

    virtual(main())


def test_garbage_ends_this_link_only_and_says_why() -> None:
    def picky(link: Link, item: Item) -> None:
        Failure.FromString(item.body)

    def rude(link: Link, item: Item) -> None:
        raise LinkProtocolError("no")

    async def main() -> None:
        for serve in (picky, rude):
            left, right = Recorder(), Recorder(serve)
            async with Pair(left, right) as pair:
                pair.left.send_new(FRAME, id=JOB, body=b"\xff\xff\xff")
                await right.until(lambda right=right: bool(right.ends))  # type: ignore[misc]  # a default argument binds the loop variable
                assert right.ends == [LinkEnd.PROTOCOL_ERROR]
                await pair.right.joined()
                await pair.right.last_words(1.0)
                await left.until(lambda left=left: bool(left.goodbyes))  # type: ignore[misc]  # a default argument binds the loop variable

    virtual(main())


def test_a_second_hello_and_an_overfull_batch_are_protocol_errors() -> None:
    async def main() -> None:
        for batch in (Batch(items=[Item(kind=1)]), Batch(items=[Item(kind=FRAME)] * 257)):  # type: ignore[arg-type]  # any int is a valid open enum value
            right = Recorder()
            async with Pair(Recorder(), right) as pair:
                pair.right.deliver(batch)
                assert right.ends == [LinkEnd.PROTOCOL_ERROR]
                assert not right.items

    virtual(main())


def test_a_bug_in_serving_one_item_does_not_take_the_link_down() -> None:
    def buggy(link: Link, item: Item) -> None:
        if item.body == b"bug":
            raise KeyError("bug")
        echo(link, item)

    async def main() -> None:
        async with Pair(Recorder(), Recorder(buggy)) as pair:
            bad, good = pair.left.call(b"bug", 1.0), pair.left.call(b"good", 1.0)
            with pytest.raises(MeshError) as caught:
                await bad
            assert caught.value.reason is Reason.INTERNAL
            assert await good == b"good"
            assert pair.right.stats.item_errors == 1

    virtual(main())


def test_windows_of_an_open_flow_bypass_the_receiver() -> None:
    async def main() -> None:
        right, windows = Recorder(), list[Window]()
        async with Pair(Recorder(), right) as pair:
            pair.right.open_flow(JOB, windows.append)
            body = Window(consumed_bytes=7).SerializeToString()
            pair.left.send_new(WINDOW, id=JOB, body=body)
            pair.left.send_new(WINDOW, id=OTHER, body=body)
            await right.until(lambda: len(right.items) == 1)
            pair.right.close_flow(JOB)
            pair.left.send_new(WINDOW, id=JOB, body=body)
            await right.until(lambda: len(right.items) == 2)
            assert [item.id for item in right.items] == [OTHER, JOB]
            assert windows == [Window(consumed_bytes=7)]

    virtual(main())


def test_a_relay_forwards_received_items_as_they_are() -> None:
    async def main() -> None:
        end = Recorder()
        async with Pair(Recorder(), end) as second:

            def forward(link: Link, item: Item) -> None:
                second.left.send(item)

            async with Pair(Recorder(), Recorder(forward)) as first:
                sent = [
                    Item(kind=FRAME, id=new_id(), fence=fence(1, 2), seq=n, tokens=n * 3, flags=4, body=b"x" * n)
                    for n in range(300)
                ]
                for item in sent:
                    first.left.send(item)
                await end.until(lambda: len(end.items) == 300)
                assert end.items == sent
                assert all(item.kind != CALL for item in end.items)

    virtual(main())
