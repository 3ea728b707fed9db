"""The node's metrics: cells bound once, added to on the hot path."""

from typing import Final

from gpumesh_runtime.metrics import Cell, HistogramCell, counter, gauge, histogram

JOBS: Final = counter("gpumesh_node_jobs_total", "Jobs that ended, by model and how", ("model", "outcome"))
FAILURES: Final = counter(
    "gpumesh_node_engine_failures_total", "Jobs that failed at the engine, by engine and reason", ("engine", "reason")
)
REJECTS: Final = counter("gpumesh_node_offers_rejected_total", "Offers that were refused, by reason", ("reason",))
RUNNING: Final = gauge("gpumesh_node_jobs_running", "Jobs that have a slot", ("model",))
WAITING: Final = gauge("gpumesh_node_jobs_waiting", "Accepted jobs that wait for a slot", ("model",))
TOKENS: Final = counter("gpumesh_node_output_tokens_total", "Output tokens of completed jobs", ("model",))
PROMPT_TOKENS: Final = counter("gpumesh_node_prompt_tokens_total", "Prompt tokens of completed jobs", ("model",))
FIRST_OUTPUT: Final = histogram("gpumesh_node_first_output_seconds", "Offer to first output", ("model",))
DURATION: Final = histogram("gpumesh_node_job_seconds", "Offer to the end of completed jobs", ("model",))
FRAMES: Final = counter("gpumesh_node_frames_total", "Frames sent").cell
WINDOW_WAITS: Final = counter(
    "gpumesh_node_window_waits_total", "Times a job stopped reading its engine because its client reads slowly"
).cell
SESSIONS: Final = counter("gpumesh_node_sessions_total", "Sessions opened").cell
SESSION_UP: Final = gauge("gpumesh_node_session_up", "1 while a session is up").cell
SESSION_ENDS: Final = counter("gpumesh_node_session_ends_total", "Sessions that ended, by how", ("end",))
ORPHANS: Final = counter(
    "gpumesh_node_orphans_dropped_total", "Jobs given up because no session came back in time"
).cell
RECEIPTS: Final = gauge("gpumesh_node_receipts_unacknowledged", "Receipts in the journal").cell
RECEIPTS_SENT: Final = counter("gpumesh_node_receipts_presented_again_total", "Receipts sent again").cell
RECEIPTS_ACKED: Final = counter(
    "gpumesh_node_receipts_acknowledged_total", "Receipts acknowledged, by result", ("result",)
)
JOURNAL_FAILURES: Final = counter("gpumesh_node_journal_failures_total", "Receipts that the disk did not take").cell
IGNORED: Final = counter(
    "gpumesh_node_items_ignored_total",
    "Items of the scheduler that were not acted on, by kind and reason",
    ("kind", "reason"),
)
ENGINE_STARTS: Final = counter("gpumesh_node_engine_starts_total", "Starts of an engine's process", ("engine",))
ENGINE_UP: Final = gauge("gpumesh_node_model_ready", "1 while a model answers", ("model",))


class ModelMeters:
    """One model's cells."""

    __slots__ = (
        "cancelled",
        "completed",
        "duration",
        "failed",
        "first_output",
        "prompt_tokens",
        "ready",
        "running",
        "tokens",
        "waiting",
    )

    def __init__(self, model_id: str) -> None:
        self.completed: Cell = JOBS.labels(model_id, "completed")
        self.cancelled: Cell = JOBS.labels(model_id, "cancelled")
        self.failed: Cell = JOBS.labels(model_id, "failed")
        self.running: Cell = RUNNING.labels(model_id)
        self.waiting: Cell = WAITING.labels(model_id)
        self.tokens: Cell = TOKENS.labels(model_id)
        self.prompt_tokens: Cell = PROMPT_TOKENS.labels(model_id)
        self.first_output: HistogramCell = FIRST_OUTPUT.labels(model_id)
        self.duration: HistogramCell = DURATION.labels(model_id)
        self.ready: Cell = ENGINE_UP.labels(model_id)
