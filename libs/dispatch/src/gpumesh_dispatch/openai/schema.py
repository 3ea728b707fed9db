"""Typed shape of an OpenAI chat request, for msgspec. Only what the mesh must understand: other fields are skipped, and reach the engine
because the payload is the raw body. Bounds that msgspec checks by itself are written here, so that they cost nothing per request.

Source of names and bounds: OpenAI's published API description, CreateChatCompletionRequest.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Raw

MAX_CHOICES: Final = 128
MAX_STOP_SEQUENCES: Final = 4
MAX_TOP_LOGPROBS: Final = 20
MAX_TOOLS: Final = 128
MAX_MODEL_CHARS: Final = 128
MAX_OUTPUT_TOKENS: Final = 1 << 24  # beyond any context there is: keeps sums far from int64

ShortName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]


class ImageUrl(msgspec.Struct):
    """Where an image is: https or data URL."""

    url: str


class ContentPart(msgspec.Struct):
    """One part of a message. Which fields it must have depends on `type`; checked in `validate`."""

    type: Literal["text", "image_url", "input_audio", "file", "refusal"]
    text: str | None = None
    image_url: ImageUrl | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct):
    """What an assistant message called earlier."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that an assistant message made earlier."""

    id: str
    function: FunctionCall | None = None
    type: str = "function"


class Message(msgspec.Struct):
    """One message of the conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    function_call: FunctionCall | None = None


class Function(msgspec.Struct):
    """A function that the model may call. `parameters` is a JSON schema, kept as text."""

    name: ShortName
    description: str | None = None
    parameters: Raw = Raw()
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct):
    """Names a function."""

    name: str


class NamedToolChoice(msgspec.Struct):
    """Forces one function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(msgspec.Struct):
    """Asked schema of a structured answer."""

    name: ShortName
    schema: Raw = Raw()
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    """Asked format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(msgspec.Struct):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class UsageOptions(msgspec.Struct):
    """Ours: `"usage": {"include": true}` asks for the cost in the answer's usage."""

    include: bool | None = None


class ChatRequest(msgspec.Struct):
    """Body of POST /v1/chat/completions, as far as the mesh reads it."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_STOP_SEQUENCES)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    user: str | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    usage: UsageOptions | None = None
