"""A node and a scheduler over a real link: offers, answers, cancels, windows, receipts, reconnects, drain."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gpumesh.common.v1.job_pb2 import Modality
from gpumesh.common.v1.link_pb2 import GoodbyeReason, ItemFlag, ItemKind
from gpumesh.node.v1 import session_pb2
from gpumesh_runtime.lifecycle import Life
from tests.support.node_process import node_settings, running_node
from tests.support.node_scheduler import FENCE, FakeScheduler, NodeCertificates, chat

MOCK: dict[str, Any] = {"kind": "mock", "model_id": "m", "slots": 2}


@asynccontextmanager
async def mesh(
    folder: Path, engine: dict[str, Any] | None = None, **more: Any
) -> AsyncIterator[tuple[FakeScheduler, Life]]:
    """A scheduler and a node with mock-model, connected."""
    certificates = NodeCertificates(folder)
    async with FakeScheduler(certificates.scheduler) as scheduler:
        settings = node_settings(folder, certificates.node(), [scheduler.address], [engine or MOCK], **more)
        async with running_node(settings) as life:
            await scheduler.ready()
            yield scheduler, life


async def test_hello_says_who_the_node_is_and_what_it_serves(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        hello = scheduler.hellos[0]
        assert (hello.node_id, hello.session_counter) == ("n1", 1)
        assert hello.boot_id
        (model,) = hello.status.models
        assert (model.build.model_id, model.slots, model.state) == ("m", 2, session_pb2.MODEL_STATE_READY)
        assert scheduler.peers[0].provider_id == "p1"


async def test_a_streamed_job_is_answered(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = await scheduler.completed(scheduler.offer(chat("[[mock tokens=5 tps=200]]")))
        assert not job.rejects
        assert len(job.text.split()) == 5
        assert job.done.usage.completion_tokens == 5
        assert job.done.usage.prompt_tokens > 0
        assert job.dones[0].tokens == 5
        assert job.done.build.engine_name == "mock-model"
        assert 0 < job.done.timing.first_output_us <= job.done.timing.total_us
        assert job.deltas[-1].finish_reason == session_pb2.FINISH_REASON_STOP


async def test_a_quick_answer_is_its_own_acceptance_and_a_slow_one_is_accepted_before(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        quick = await scheduler.completed(scheduler.offer(streaming=False))
        assert quick.kinds == [ItemKind.ITEM_KIND_DONE]
        slow = scheduler.offer(chat("[[mock stall_after=0]]"))
        await scheduler.until(lambda: slow.kinds, 1.0)
        assert slow.kinds == [ItemKind.ITEM_KIND_ACCEPT]


async def test_an_answer_that_is_not_streamed_is_one_frame(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = await scheduler.completed(scheduler.offer(chat("[[mock tokens=9]]"), streaming=False))
        assert len(job.frames) == 1
        assert job.frames[0].tokens == 9


async def test_the_cap_of_the_offer_ends_the_answer(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = await scheduler.completed(scheduler.offer(chat("[[mock tokens=50]]"), max_output_tokens=7))
        assert job.done.usage.completion_tokens == 7
        assert job.deltas[-1].finish_reason == session_pb2.FINISH_REASON_LENGTH


async def test_a_payload_in_pieces_is_put_together(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        text = "alpha beta " * 20_000
        job = await scheduler.completed(
            scheduler.offer(chat(text + "[[mock echo=1]]"), pieces=5, max_output_tokens=100_000, window_bytes=1 << 30)
        )
        assert job.text == text + "[[mock echo=1]]"


async def test_a_broken_payload_fails_the_job_only(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        link = await scheduler.up()
        job = scheduler.offer(chat("x" * 1000), pieces=1, job_id=b"a" * 16)
        link.send_new(
            ItemKind.ITEM_KIND_PAYLOAD, id=b"a" * 16, fence=FENCE, seq=1, flags=ItemFlag.ITEM_FLAG_LAST, body=b"again"
        )
        await scheduler.ended(job)
        other = scheduler.offer(b"not json at all")
        await scheduler.ended(other)
        assert other.failure.reason == "INVALID_ARGUMENT"
        assert not other.failure.retryable
        await scheduler.completed(scheduler.offer())


async def test_a_gap_in_the_payload_is_a_protocol_error_of_that_job(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        link = await scheduler.up()
        job = scheduler.offer(b"")
        assert (await scheduler.ended(job)).rejects[0].reason == "INVALID_ARGUMENT"
        offer = session_pb2.Offer(model_id="m", modality=Modality.MODALITY_CHAT, max_output_tokens=5, payload_bytes=10)
        link.send_new(ItemKind.ITEM_KIND_OFFER, id=b"b" * 16, fence=FENCE, body=offer.SerializeToString())
        link.send_new(ItemKind.ITEM_KIND_PAYLOAD, id=b"b" * 16, fence=FENCE, seq=2, body=b"12345")
        await scheduler.until(
            lambda: scheduler.jobs.get((b"b" * 16, FENCE)) and scheduler.jobs[(b"b" * 16, FENCE)].errors
        )
        assert scheduler.jobs[(b"b" * 16, FENCE)].failure.reason == "PROTOCOL_ERROR"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_id": "other"}, "MODEL_UNAVAILABLE"),
        ({"max_output_tokens": 0}, "INVALID_ARGUMENT"),
        ({"prefix_token_ids": [1, 2]}, "FEATURE_UNSUPPORTED"),
    ],
)
async def test_an_offer_that_cannot_be_served_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = await scheduler.ended(scheduler.offer(**fields))
        assert [reject.reason for reject in job.rejects] == [reason]


async def test_more_jobs_than_slots_wait_and_more_than_that_are_refused(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        jobs = [scheduler.offer(chat("[[mock tokens=3 tps=30]]")) for _ in range(5)]
        for job in jobs:
            await scheduler.ended(job)
        assert [len(job.rejects) for job in jobs] == [0, 0, 0, 0, 1]
        assert jobs[4].rejects[0].reason == "NO_CAPACITY"
        assert [job.accepts[0].queued for job in jobs[2:4]] == [1, 2]


async def test_a_cancel_stops_the_engine_and_is_answered_with_usage(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        link = await scheduler.up()
        job = scheduler.offer(chat("[[mock tokens=1000 tps=200]]"), max_output_tokens=1000)
        await scheduler.until(lambda: len(job.frames) >= 3)
        link.cancel(job.id, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: job.cancel_acks)
        assert job.cancel_ack.usage.completion_tokens >= 3
        assert job.cancel_ack.receipt_token
        assert not job.dones
        count = len(job.frames)
        await scheduler.completed(scheduler.offer())
        assert len(job.frames) == count
        await scheduler.until(lambda: scheduler.statuses and not scheduler.statuses[-1].running)


async def test_a_cancel_while_it_waits_for_a_slot_claims_nothing(tmp_path: Path) -> None:
    async with mesh(tmp_path, {**MOCK, "slots": 1}) as (scheduler, _):
        link = await scheduler.up()
        first = scheduler.offer(chat("[[mock stall_after=0]]"))
        second = scheduler.offer()
        await scheduler.until(lambda: second.accepts)
        link.cancel(second.id, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: second.cancel_acks)
        assert second.cancel_ack.usage.prompt_tokens == 0
        link.cancel(first.id, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: first.cancel_acks)
        await scheduler.completed(scheduler.offer())


async def test_a_cancel_of_an_unknown_job_is_answered_with_nothing_done(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        link = await scheduler.up()
        link.cancel(b"z" * 16, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: (b"z" * 16, FENCE) in scheduler.jobs)
        assert scheduler.jobs[(b"z" * 16, FENCE)].cancel_ack == session_pb2.CancelAck()


async def test_a_cancel_of_an_earlier_try_does_not_touch_the_later_one(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        link = await scheduler.up()
        first = scheduler.offer(chat("[[mock stall_after=0]]"))
        await scheduler.until(lambda: first.accepts)
        second = scheduler.offer(chat("[[mock tokens=4 tps=50]]"), job_id=first.id, fence=FENCE + 1)
        await scheduler.until(lambda: second.kinds)
        link.cancel(first.id, "STALE_FENCE", fence=FENCE)
        await scheduler.completed(second)
        assert not first.dones


async def test_an_earlier_try_that_comes_late_is_refused(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        later = scheduler.offer(chat("[[mock tokens=4 tps=40]]"), fence=FENCE + 1)
        earlier = scheduler.offer(job_id=later.id, fence=FENCE)
        assert (await scheduler.ended(earlier)).rejects[0].reason == "STALE_FENCE"
        await scheduler.completed(later)


async def test_the_same_offer_again_is_accepted_again_and_runs_once(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = scheduler.offer(chat("[[mock tokens=4 tps=40]]"))
        again = scheduler.offer(chat("[[mock tokens=4 tps=40]]"), job_id=job.id)
        await scheduler.completed(again)
        assert len(again.accepts) >= 1
        assert len(again.dones) == 1


async def test_a_slow_reader_stops_the_node_at_its_window(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = scheduler.offer(chat("[[mock tokens=400 tps=2000]]"), window_bytes=4096, max_output_tokens=400)
        await scheduler.until(lambda: len(job.frames) >= 4)
        other = await scheduler.completed(scheduler.offer(chat("[[mock tokens=20 tps=400]]")))
        assert other.dones
        assert not job.dones
        rendered = sum(
            256 * len(session_pb2.Frame.FromString(item.body).deltas) + len(item.body) for item in job.frames
        )
        assert rendered <= 4096
        while not job.dones:
            seen = len(job.frames)
            scheduler.window(job, job.frames[-1].seq)
            await scheduler.until(lambda seen=seen: len(job.frames) > seen or job.dones)  # type: ignore[misc]  # bound now
        await scheduler.completed(job)
        assert job.done.usage.completion_tokens == 400


async def test_the_deadline_ends_a_job(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = await scheduler.ended(scheduler.offer(chat("[[mock stall_after=2]]"), deadline_ms=150))
        assert job.failure.reason == "DEADLINE_EXCEEDED"
        assert job.errors[0].seq == len(job.frames)
        await scheduler.completed(scheduler.offer())


async def test_an_engine_that_breaks_before_content_is_retryable_and_after_it_is_not(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        before = await scheduler.ended(scheduler.offer(chat("[[mock die_after=0]]")))
        assert (before.failure.reason, before.failure.retryable) == ("ENGINE_ERROR", True)
        after = await scheduler.ended(scheduler.offer(chat("[[mock die_after=3 tps=100]]")))
        assert (after.failure.reason, after.failure.retryable) == ("ENGINE_ERROR", False)
        assert after.errors[0].seq == len(after.frames) > 0
        context = await scheduler.ended(scheduler.offer(chat("[[mock error=context]]")))
        assert context.failure.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert {"limit", "used"} <= set(context.failure.metadata)


async def test_a_receipt_is_presented_again_until_it_is_acknowledged(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        settled = await scheduler.completed(scheduler.offer())
        scheduler.ack(settled.id)
        open_job = await scheduler.completed(scheduler.offer())
        await scheduler.stop()
        await scheduler.start()
        await scheduler.until(lambda: scheduler.receipts)
        job_id, fence, receipt = scheduler.receipts[0]
        assert (job_id, fence) == (open_job.id, FENCE)
        assert receipt.usage.completion_tokens == open_job.done.usage.completion_tokens
        assert receipt.receipt_token == open_job.done.receipt_token
        scheduler.ack(open_job.id)
        await scheduler.completed(scheduler.offer(job_id=b"c" * 16))
        await scheduler.stop()
        scheduler.receipts.clear()
        await scheduler.start()
        await scheduler.until(lambda: scheduler.receipts)
        assert [job_id for job_id, _, _ in scheduler.receipts] == [b"c" * 16]


async def test_receipts_outlive_the_process(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with FakeScheduler(certificates.scheduler) as scheduler:
        settings = node_settings(tmp_path, certificates.node(), [scheduler.address], [MOCK])
        async with running_node(settings):
            await scheduler.ready()
            job = await scheduler.completed(scheduler.offer())
        async with running_node(settings):
            await scheduler.until(lambda: scheduler.receipts)
            assert scheduler.receipts[0][0] == job.id
        counters = [hello.session_counter for hello in scheduler.hellos]
        assert counters == sorted(set(counters))


async def test_a_job_goes_on_where_the_session_broke(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        job = scheduler.offer(chat("[[mock tokens=60 tps=60]]"), max_output_tokens=60)
        await scheduler.until(lambda: len(job.frames) >= 5)
        await scheduler.stop()
        await scheduler.start()
        await scheduler.until(lambda: len(scheduler.hellos) > 1)
        running = scheduler.hellos[-1].status.running
        assert [(entry.job_id, entry.fence) for entry in running] == [(job.id, FENCE)]
        await scheduler.until(lambda: job.dones)
        assert {item.seq for item in job.frames} == set(range(1, job.dones[0].seq + 1))
        assert len(job.text.split()) == 60


async def test_a_job_without_a_session_is_given_up_after_a_while(tmp_path: Path) -> None:
    async with mesh(tmp_path, orphan_s=0.1) as (scheduler, _):
        job = scheduler.offer(chat("[[mock stall_after=1]]"))
        await scheduler.until(lambda: job.frames)
        await scheduler.stop()
        await asyncio.sleep(0.15)  # the orphan timer itself: nothing else tells of it
        await scheduler.start()
        await scheduler.up()
        assert not scheduler.hellos[-1].status.running
        await scheduler.completed(scheduler.offer())


async def test_the_node_moves_to_another_scheduler(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with (
        FakeScheduler(certificates.scheduler) as one,
        FakeScheduler(certificates.scheduler, scheduler_id="s2") as two,
    ):
        settings = node_settings(tmp_path, certificates.node(), [one.address, two.address], [MOCK])
        async with running_node(settings):
            async with asyncio.timeout(10):
                while one.link is None and two.link is None:
                    await asyncio.sleep(0.01)
            first, other = (one, two) if one.link is not None else (two, one)
            await first.stop()
            await other.ready()
            await other.completed(other.offer())


async def test_drain_tells_it_finishes_what_runs_and_says_goodbye(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, life):
        job = scheduler.offer(chat("[[mock tokens=20 tps=40]]"))
        await scheduler.until(lambda: job.frames)
        life.stop("test")
        await scheduler.until(lambda: scheduler.statuses and scheduler.statuses[-1].draining)
        refused = await scheduler.ended(scheduler.offer())
        assert refused.rejects[0].reason == "NODE_DRAINING"
        await scheduler.completed(job)
        await scheduler.until(lambda: scheduler.goodbyes)
        assert scheduler.goodbyes[0].reason == GoodbyeReason.GOODBYE_REASON_DRAIN


async def test_garbage_from_the_scheduler_ends_that_session_only(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        link = await scheduler.up()
        link.send_new(ItemKind.ITEM_KIND_OFFER, id=b"g" * 16, fence=FENCE, body=b"\xff\xff\xff garbage")
        await scheduler.until(lambda: len(scheduler.hellos) > 1)
        await scheduler.up()
        await scheduler.completed(scheduler.offer())


async def test_a_directive_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (scheduler, _):
        link = await scheduler.up()
        link.send_new(ItemKind.ITEM_KIND_DIRECTIVE, body=session_pb2.Directive(generation=1).SerializeToString())
        await scheduler.completed(scheduler.offer())
        assert len(scheduler.hellos) == 1
