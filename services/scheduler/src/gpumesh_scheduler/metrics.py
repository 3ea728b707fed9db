"""Metrics of the scheduler: plain cells, bound once. Reasons are from the closed list."""

from typing import Final

from gpumesh_runtime.metrics import LATENCY_S, Cell, counter, gauge, histogram
from gpumesh_scheduler.domain.job import Verdict

_DROPPED: Final = counter(
    "gpumesh_scheduler_dropped_items_total", "Items from nodes that were dropped, by reason", ("reason",)
)
DROPPED: Final[dict[Verdict, Cell]] = {
    Verdict.STALE: _DROPPED.labels("stale_fence"),
    Verdict.DUPLICATE: _DROPPED.labels("duplicate"),
    Verdict.LATE: _DROPPED.labels("late"),
}
DROPPED_STRAY: Final = _DROPPED.labels("unknown_job")

JOBS: Final = counter(
    "gpumesh_scheduler_jobs_total", "Jobs that ended here, by outcome and reason", ("outcome", "reason")
)
COMPLETED: Final = JOBS.labels("COMPLETED", "")
REFUSED: Final = counter("gpumesh_scheduler_refused_total", "Submits refused, by reason", ("reason",))
TRIES_LOST: Final = counter(
    "gpumesh_scheduler_tries_lost_total", "Tries that ended without an answer, by reason", ("reason",)
)
SESSIONS_ENDED: Final = counter("gpumesh_scheduler_sessions_ended_total", "Sessions that ended, by reason", ("reason",))
BREACHES: Final = counter("gpumesh_scheduler_node_breaches_total", "Protocol errors of nodes").cell
SETTLES: Final = counter("gpumesh_scheduler_settles_total", "Settle items given to metering, repetitions included").cell
SETTLED: Final = counter(
    "gpumesh_scheduler_settled_total", "Answers from metering, by reason; empty: settled", ("reason",)
)
SETTLED_WELL: Final = SETTLED.labels("")
RECEIPTS_REFUSED: Final = counter(
    "gpumesh_scheduler_receipts_refused_total", "Receipts refused for good, by reason", ("reason",)
)

PLACED_S: Final = histogram("gpumesh_scheduler_placement_seconds", "From Submit to the first offer").cell
CONTENT_S: Final = histogram(
    "gpumesh_scheduler_first_content_seconds", "From Submit to the first content relayed", (), LATENCY_S
).cell

SESSIONS: Final = gauge("gpumesh_scheduler_sessions", "Node sessions, by state", ("state",))
RUNNING: Final = gauge("gpumesh_scheduler_jobs", "Jobs here now").cell
QUEUED: Final = gauge("gpumesh_scheduler_queued_jobs", "Jobs that wait for a slot").cell
CASES: Final = gauge("gpumesh_scheduler_unsettled_jobs", "Jobs that metering has not acknowledged").cell
CASES_DROPPED: Final = gauge(
    "gpumesh_scheduler_evidence_dropped", "Evidence refused because too much is unsettled; it comes again"
).cell
PAYLOAD: Final = gauge("gpumesh_scheduler_payload_bytes", "Payload kept for another try").cell
