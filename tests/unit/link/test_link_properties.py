"""Properties of a pair of links under random traffic, stalls and cancels, on virtual time."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.common.v1.link_pb2 import Item, Window
from gpumesh_runtime.link import (
    FLAG_FIRST,
    FLAG_LAST,
    NODE_LINK,
    FrameChecker,
    FrameVerdict,
    Link,
    ReceiveWindow,
    SendWindow,
    rendered_bytes,
)
from tests.support.links import CANCEL, DONE, FRAME, WINDOW, Pair, Recorder, virtual

OPTIONS = replace(NODE_LINK, max_message_bytes=4096, max_items=16)
Step = tuple[str, int, int]
STEPS: "st.SearchStrategy[list[Step]]" = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), st.integers(0, 5), st.integers(0, 2000)),
        st.tuples(st.just("done"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("sleep"), st.integers(0, 8), st.just(0)),
        st.tuples(st.just("stall"), st.just(0), st.just(0)),
        st.tuples(st.just("resume"), st.just(0), st.just(0)),
    ),
    max_size=120,
)


def job(number: int) -> bytes:
    return bytes([number]) * 16


class Sending:
    """What a well-behaved sender of several jobs has done, and what its receiver must therefore see."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.count = [0] * 6
        self.done: set[int] = set()
        self.cancelled: set[int] = set()

    def step(self, op: str, number: int, size: int) -> None:
        if number in self.done or number in self.cancelled:
            return
        if op == "frame":
            self.count[number] += 1
            flags = FLAG_FIRST if self.count[number] == 1 else 0
            self.link.send_new(FRAME, id=job(number), seq=self.count[number], flags=flags, body=bytes(size))
        elif op == "done":
            self.done.add(number)
            self.link.send_new(DONE, id=job(number), seq=self.count[number], flags=FLAG_LAST)
        elif op == "cancel":
            self.cancelled.add(number)
            self.link.cancel(job(number), "CLIENT_GONE")


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_nothing_is_lost_doubled_or_reordered_and_done_counts_what_came(steps: Sequence[Step]) -> None:
    async def main() -> None:
        right = Recorder()
        async with Pair(Recorder(), right, OPTIONS) as pair:
            sending = Sending(pair.left)
            for op, number, size in steps:
                if op == "sleep":
                    await asyncio.sleep(number / 1000)
                elif op == "stall":
                    pair.out.stall()
                elif op == "resume":
                    pair.out.resume()
                else:
                    sending.step(op, number, size)
            pair.out.resume()
            await pair.left.drained()
            await asyncio.sleep(0.001)
            for number in range(6):
                came = [item for item in right.items if item.id == job(number)]
                frames = [item.seq for item in came if item.kind == FRAME]
                assert frames == list(range(1, len(frames) + 1)), "in order, none twice, none missing before another"
                if number in sending.cancelled:
                    assert [item.kind for item in came if item.kind in (CANCEL, DONE)] == [CANCEL]
                    continue
                assert len(frames) == sending.count[number]
                checker = FrameChecker()
                for item in came:
                    if item.kind == FRAME:
                        assert checker.frame(item.fence, item.seq) is FrameVerdict.ACCEPT
                    elif item.kind == DONE:
                        checker.done(item.seq)
                        assert item is came[-1]
                assert (number in sending.done) == any(item.kind == DONE for item in came)
            assert pair.left.queued_total_bytes == 0

    virtual(main())


class Client:
    """The consuming end of one job: frames wait here until the client's transport takes them."""

    def __init__(self, link_of: "list[Link]", limit: int) -> None:
        self.window = ReceiveWindow(limit)
        self.waiting: list[Item] = []
        self.held_most = 0
        self._link_of = link_of

    def serve(self, link: Link, item: Item) -> None:
        if item.kind == FRAME:
            assert self.window.received(rendered_bytes(item))
            self.waiting.append(item)
            self.held_most = max(self.held_most, sum(rendered_bytes(item) for item in self.waiting))

    def drain(self, frames: int) -> None:
        for _ in range(min(frames, len(self.waiting))):
            item = self.waiting.pop(0)
            grant = self.window.consumed(item.seq, rendered_bytes(item))
            if grant is None and not self.waiting:
                grant = self.window.grant()
            if grant is not None:
                self._link_of[0].send_new(WINDOW, id=item.id, body=grant.SerializeToString())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=150),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), max_size=40),
)
def test_a_slow_client_bounds_memory_and_goes_on_when_it_reads_again(
    sizes: list[int], drains: list[tuple[int, int]]
) -> None:
    limit = 16 * 1024

    async def main() -> None:
        links: list[Link] = []
        client = Client(links, limit)
        async with Pair(Recorder(), Recorder(client.serve), OPTIONS) as pair:
            links.append(pair.right)
            window, todo = SendWindow(limit), list(enumerate(sizes, 1))

            def pump(_: Any = None) -> None:
                while todo:
                    item = Item(kind=FRAME, id=job(1), seq=todo[0][0], body=bytes(todo[0][1]))
                    if not window.can_send(rendered_bytes(item)):
                        return
                    todo.pop(0)
                    window.sent(rendered_bytes(item))
                    pair.left.send(item)

            def on_window(grant: Window) -> None:
                if window.on_window(grant):
                    pump()

            pair.left.open_flow(job(1), on_window)
            pump()
            for frames, pause in drains:
                client.drain(frames)
                await asyncio.sleep(pause / 1000)
            deadline = asyncio.get_running_loop().time() + 30  # the stall ends: it reads again
            while client.window.consumed_seq < len(sizes) and asyncio.get_running_loop().time() < deadline:
                client.drain(1000)
                await asyncio.sleep(0.005)
            assert client.window.consumed_seq == len(sizes), "no deadlock"
            assert client.held_most <= limit + 3000 + 256
            assert not todo

    virtual(main())
