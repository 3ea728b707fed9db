"""JSON fragments that streamed chunks and whole answers share. All return bytes, ready to be joined."""

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from gpumesh.common.v1.job_pb2 import Usage
from gpumesh.node.v1.session_pb2 import FinishReason, TokenLogprob

encode: Final = msgspec.json.Encoder().encode

FINISH: Final[dict[int, bytes]] = {
    FinishReason.FINISH_REASON_STOP: b'"stop"',
    FinishReason.FINISH_REASON_LENGTH: b'"length"',
    FinishReason.FINISH_REASON_TOOL_CALLS: b'"tool_calls"',
    FinishReason.FINISH_REASON_CONTENT_FILTER: b'"content_filter"',
}
# OpenAI's own value for "so unlikely that there is no number"; JSON has no infinity.
_UNLIKELY: Final = -9999.0


class AnswerHead(msgspec.Struct, frozen=True, gc=False):
    """What every chunk and the whole answer of one request repeat.

    job_id: 32 hex digits; the answer's id is "chatcmpl-" and it. created: Unix seconds. model: catalogue id. fingerprint: "" leaves it out.
    choices: how many were asked for; deltas of others are dropped. logprobs: they were asked for; otherwise a node's are dropped.
    """

    job_id: str
    created: int
    model: str
    fingerprint: str = ""
    choices: int = 1
    logprobs: bool = False

    def prefix(self, kind: bytes) -> bytes:
        """`{"id":...,"object":kind,"created":...,"model":...,"system_fingerprint":...` without a closing brace."""
        mark = b',"system_fingerprint":' + encode(self.fingerprint) if self.fingerprint else b""
        return b'{"id":"chatcmpl-%b","object":"%b","created":%d,"model":%b%b' % (
            self.job_id.encode(),
            kind,
            self.created,
            encode(self.model),
            mark,
        )

    def call_id(self, choice: int, index: int) -> str:
        """Id of a tool call whose engine gave none."""
        return f"call_{self.job_id[:20]}{choice:02x}{index:02x}"


def usage_json(usage: Usage, cost_nano_usd: int | None = None) -> bytes:
    """OpenAI's usage object; `cost_nano_usd` is ours and only there when asked for."""
    cost = b"" if cost_nano_usd is None else b',"cost_nano_usd":%d' % cost_nano_usd
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d},'
        b'"completion_tokens_details":{"reasoning_tokens":%d}%b}'
        % (prompt, completion, prompt + completion, usage.cached_prompt_tokens, usage.reasoning_tokens, cost)
    )


def _number(value: float) -> float:
    return value if math.isfinite(value) else _UNLIKELY


def _token(entry: TokenLogprob) -> bytes:
    raw = entry.token_bytes
    return b'"token":%b,"logprob":%b,"bytes":%b' % (
        encode(entry.token),
        encode(_number(entry.logprob)),
        encode(list(raw)) if raw else b"null",
    )


def logprob_tokens(entries: Iterable[TokenLogprob]) -> bytes:
    """The tokens as the inside of a JSON list, without brackets."""
    return b",".join(
        b'{%b,"top_logprobs":[%b]}' % (_token(entry), b",".join(b"{%b}" % _token(other) for other in entry.top))
        for entry in entries
    )
