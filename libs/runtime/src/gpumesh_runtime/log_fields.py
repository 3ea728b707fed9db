"""Every field name that may appear in a log line. Adding one is a
decision: can its value ever hold what a client wrote? Then it may not.
"""

from typing import Final

# Of the line itself.
_LINE: Final = "event level timestamp service name instance trace_id span_id error_hash error_type traceback warning"
# Who and what: ids are opaque and made by us, or chosen by an operator.
_IDS: Final = (
    "account_id boot_id engine engine_version features fence id identity item_kind job_id key_id kind link "
    "model model_id model_revision node node_id operator peer provider_id quantisation request_id role schema "
    "scheduler_id session session_counter task uri version"
)
# Numbers; their names end in a unit where they have one.
_NUMBERS: Final = (
    "after_s ago_s amount_nano_usd attempt attempts backoff_s batch bytes bytes_in bytes_out cached callers "
    "chunks committed completion_tokens connections count cpu_percent deadline_s delay_s delivered_tokens "
    "drain_s dropped duration_ms elapsed_ms entries errors exit_code expected failed first_token_ms frames got "
    "hold_nano_usd in_flight interval_s items jobs lag_ms latency_ms lifetime_s limit lost max next_s nodes old "
    "new pending pid port price_version prompt_tokens queue_bytes queued ratio refused removed reserved resumed "
    "retry_after_s rss_bytes running seconds seq settled shares size slots slow_ms status streams timeout_s "
    "token_count total tries try_number used waited_ms"
)
# Words of ours: constants, states, reasons, addresses, paths of files and of RPCs.
_WORDS: Final = (
    "action added address applied build cause certificate_end change client_version code database end error "
    "field fields file folder loaded method methods migration missing mode models near outcome path pool reason result "
    "services signal sql_state state stream user_agent_family"
)

FIELDS: Final = frozenset(f"{_LINE} {_IDS} {_NUMBERS} {_WORDS}".split())
