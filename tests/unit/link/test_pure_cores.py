"""Fences, ids, windows, frame checks, liveness, cancel memory, back-off: no loop, no clock."""

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.common.v1.link_pb2 import Window
from gpumesh_runtime.link import (
    FrameChecker,
    FrameVerdict,
    ItemClass,
    MissingFrames,
    ReceiveWindow,
    SendWindow,
    class_of_kind,
    fence,
    new_id,
    split_fence,
)
from gpumesh_runtime.link.backoff import Backoff
from gpumesh_runtime.link.cancelled import CancelMemory
from gpumesh_runtime.link.items import fence_covers
from gpumesh_runtime.link.liveness import Life, Liveness
from gpumesh_runtime.link.options import NODE_LINK, SERVICE_LINK

JOB = b"j" * 16


def test_the_number_of_a_kind_says_its_class() -> None:
    assert [class_of_kind(kind) for kind in (1, 31, 32, 63, 64, 95)] == [
        ItemClass.CONTROL,
        ItemClass.CONTROL,
        ItemClass.DATA,
        ItemClass.DATA,
        ItemClass.BACKGROUND,
        ItemClass.BACKGROUND,
    ]


@given(st.integers(0, 2**40), st.integers(0, 65535))
def test_fences_split_into_what_they_were_made_of(attempt: int, try_: int) -> None:
    assert split_fence(fence(attempt, try_)) == (attempt, try_)


def test_a_later_attempt_or_try_has_the_higher_fence() -> None:
    assert fence(1, 2) > fence(1, 1)
    assert fence(2, 1) > fence(1, 65535)
    with pytest.raises(ValueError, match="try"):
        fence(1, 65536)


def test_a_cancel_covers_its_try_its_attempt_or_everything() -> None:
    assert fence_covers(0, fence(7, 7))
    assert fence_covers(fence(1, 0), fence(1, 3))
    assert not fence_covers(fence(1, 0), fence(2, 0))
    assert fence_covers(fence(1, 2), fence(1, 2))
    assert not fence_covers(fence(1, 2), fence(1, 3))


def test_ids_differ_also_in_a_forked_child() -> None:
    assert len({new_id() for _ in range(1000)}) == 1000
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, new_id())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 16) != new_id()
    os.close(reader)
    os.close(writer)


def test_a_window_lets_one_frame_through_however_large() -> None:
    window = SendWindow(1000)
    assert window.can_send(5000)
    window.sent(5000)
    assert not window.can_send(1)
    assert window.on_window(Window(consumed_seq=1, consumed_bytes=5000))
    assert window.can_send(1000)


def test_repeated_and_old_windows_change_nothing() -> None:
    window = SendWindow(1000)
    window.sent(900)
    assert window.on_window(Window(consumed_bytes=500))
    assert not window.on_window(Window(consumed_bytes=500))
    assert not window.on_window(Window(consumed_bytes=300))
    assert window.consumed_bytes == 500


def test_a_stranger_cannot_open_the_window_further_than_what_was_sent() -> None:
    window = SendWindow(1000)
    window.sent(800)
    window.on_window(Window(consumed_bytes=2**62))
    window.sent(1000)
    assert not window.can_send(1)


def test_a_window_may_change_its_limit() -> None:
    window = SendWindow(1000)
    window.sent(1000)
    assert window.on_window(Window(limit_bytes=4000))
    assert window.can_send(3000)


def test_the_receiver_notices_a_sender_that_goes_too_far() -> None:
    window = ReceiveWindow(1000)
    assert window.received(600)
    assert window.received(400)
    assert not window.received(1)


@given(
    st.lists(st.integers(256, 9000), min_size=1, max_size=200),
    st.integers(1, 40_000),
    st.lists(st.integers(0, 5), max_size=400),
    st.booleans(),
)
def test_no_window_deadlocks_after_a_stall_and_memory_stays_bounded(
    frames: list[int], limit: int, drains: list[int], lose_windows: bool
) -> None:
    """A sender, a path, and a client that drains in fits and starts. When it drains at last, everything arrives."""
    sender, receiver = SendWindow(limit), ReceiveWindow(limit)
    todo, path = list(enumerate(frames, 1)), list[tuple[int, int]]()

    def send() -> None:
        while todo and sender.can_send(todo[0][1]):
            seq, size = todo.pop(0)
            sender.sent(size)
            assert receiver.received(size)
            path.append((seq, size))
            assert sum(size for _, size in path) <= limit + max(frames)

    send()
    for n, drained in enumerate(drains):
        for _ in range(min(drained, len(path))):
            grant = receiver.consumed(*path.pop(0))
            if grant is not None and not (lose_windows and n % 3 == 0):
                sender.on_window(grant)
        send()
    sender.on_window(receiver.grant())  # a reconnect repeats it, so a lost one does no harm
    send()
    while path:
        grant = receiver.consumed(*path.pop(0))
        if grant is not None:
            sender.on_window(grant)
        elif not path:
            sender.on_window(receiver.grant())  # the consumer's drain to empty always grants
        send()
    assert not todo
    assert receiver.consumed_seq == len(frames)


def test_frames_are_accepted_once_and_in_order() -> None:
    checker = FrameChecker()
    one = fence(1, 1)
    assert checker.frame(one, 1) is FrameVerdict.ACCEPT
    assert checker.frame(one, 1) is FrameVerdict.DUPLICATE
    assert checker.frame(one, 3) is FrameVerdict.GAP
    assert checker.frame(one, 2) is FrameVerdict.ACCEPT
    checker.done(2)


def test_a_later_fence_starts_again_and_the_earlier_is_stale() -> None:
    checker = FrameChecker()
    checker.frame(fence(1, 1), 1)
    assert checker.frame(fence(1, 2), 1) is FrameVerdict.ACCEPT
    assert checker.frame(fence(1, 1), 2) is FrameVerdict.STALE


def test_done_with_another_count_than_arrived_names_both_numbers() -> None:
    checker = FrameChecker()
    checker.frame(fence(1, 1), 1)
    with pytest.raises(MissingFrames) as caught:
        checker.done(3)
    assert caught.value.metadata == {"expected": "3", "received": "1"}


def test_silence_makes_suspect_at_15_s_and_lost_at_25_s() -> None:
    life = Liveness(SERVICE_LINK, 100.0, 0.5)
    assert life.life(114.9) is Life.ALIVE
    assert life.life(115.0) is Life.SUSPECT
    assert life.life(125.0) is Life.LOST
    life.heard_at = 120.0
    assert life.life(125.0) is Life.ALIVE


@given(st.floats(0, 1, exclude_max=True))
def test_an_idle_side_beats_every_8_to_12_s(jitter: float) -> None:
    life = Liveness(SERVICE_LINK, 0.0, jitter)
    wait = life.next_tick(0.0)
    assert 8.0 <= wait <= 12.0
    assert life.tick(wait) == (Life.ALIVE, True)


def test_a_process_that_stood_still_gives_silence_a_second_chance() -> None:
    life = Liveness(SERVICE_LINK, 0.0, 0.5)
    life.next_tick(0.0)
    assert life.tick(3600.0) == (Life.SUSPECT, True)
    life.sent_at = 3600.0
    assert life.next_tick(3600.0) == pytest.approx(10.0)
    assert life.tick(3610.0)[0] is Life.LOST


def test_a_cancel_is_remembered_for_60_s_and_for_its_fence_only() -> None:
    memory = CancelMemory(60.0)
    memory.add(JOB, fence(1, 0), 0.0)
    assert memory.covers(JOB, fence(1, 2), 59.0)
    assert not memory.covers(JOB, fence(2, 1), 59.0)
    assert not memory.covers(JOB, fence(1, 2), 60.0)
    memory.add(b"k" * 16, 0, 61.0)
    assert len(memory) == 1


def test_a_second_cancel_of_a_job_covers_no_less_than_the_first() -> None:
    memory = CancelMemory(60.0)
    memory.add(JOB, 0, 0.0)
    memory.add(JOB, fence(1, 1), 1.0)
    assert memory.covers(JOB, fence(9, 9), 2.0)


def test_cancel_memory_is_bounded_in_number() -> None:
    memory = CancelMemory(60.0)
    for n in range(70_000):
        memory.add(n.to_bytes(16, "big"), 0, 0.0)
    assert len(memory) == 65_536


def test_back_off_doubles_from_100_ms_to_1_s_with_full_jitter() -> None:
    backoff = Backoff(SERVICE_LINK)
    assert [backoff.next_wait(1.0) for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert backoff.next_wait(0.0) == 0.0
    backoff.succeeded()
    assert backoff.next_wait(1.0) == pytest.approx(0.1)


def test_nodes_take_advice_on_spread_and_hurry_back_once_with_live_jobs() -> None:
    backoff = Backoff(NODE_LINK)
    backoff.spread(67.0, 120.0)
    backoff.within(1.5)
    assert [backoff.next_wait(1.0) for _ in range(3)] == pytest.approx([1.5, 67.0, 120.0])


def test_options_are_frozen_and_can_be_replaced() -> None:
    assert replace(NODE_LINK, heartbeat_s=5.0).heartbeat_s == 5.0
    with pytest.raises(AttributeError):
        NODE_LINK.heartbeat_s = 1.0  # type: ignore[misc]  # that it is refused is the point
