"""Rules of a chat request that span fields, features that it needs of an engine, and the size of its prompt."""

from typing import Final

from gpumesh.common.v1.job_pb2 import Feature
from gpumesh_dispatch.openai.schema import ChatRequest, ContentPart, Message, NamedToolChoice
from gpumesh_runtime.errors import InvalidArgument, MeshError, Reason

_MUST_HAVE_CONTENT: Final = frozenset({"developer", "system", "user", "tool"})
# A message costs its role and a few template tokens beyond its text; counted as bytes where only bytes are known.
_ROLE_BYTES: Final = 16

_VISION: Final = Feature.FEATURE_VISION
_LOGPROBS: Final = Feature.FEATURE_LOGPROBS
_MULTIPLE_CHOICES: Final = Feature.FEATURE_MULTIPLE_CHOICES
_TOOLS: Final = Feature.FEATURE_TOOLS
_STRUCTURED: Final = Feature.FEATURE_STRUCTURED


def bad(param: str, message: str) -> MeshError:
    """INVALID_ARGUMENT that names `param` (empty: the body as a whole)."""
    return InvalidArgument(Reason.INVALID_ARGUMENT, message, metadata={"param": param} if param else None)


def unsupported(param: str, feature: str, message: str) -> MeshError:
    """FEATURE_UNSUPPORTED that names `param` and `feature`."""
    return InvalidArgument(Reason.FEATURE_UNSUPPORTED, message, metadata={"param": param, "feature": feature})


def check_chat(request: ChatRequest) -> tuple[tuple["Feature.ValueType", ...], int]:
    """Checks the rules; returns features and the prompt's text in bytes (UTF-8, tools and schema included).

    Raises InvalidArgument with metadata "param".
    """
    features: list[Feature.ValueType] = []
    prompt_bytes, vision = _check_messages(request.messages)
    if vision:
        features.append(_VISION)
    if request.stream_options is not None and request.stream is not True:
        raise bad(
            "stream_options", "'stream_options' is only allowed with 'stream': true. Set 'stream' or leave it out."
        )
    first, second = request.max_tokens, request.max_completion_tokens
    if first is not None and second is not None and first != second:
        raise bad(
            "max_tokens",
            "'max_tokens' and 'max_completion_tokens' differ. Give one of them; 'max_completion_tokens' is the newer name.",
        )
    if request.top_logprobs is not None and request.logprobs is not True:
        raise bad("top_logprobs", "'top_logprobs' needs 'logprobs': true.")
    if request.logprobs:
        features.append(_LOGPROBS)
    if request.n is not None and request.n > 1:
        features.append(_MULTIPLE_CHOICES)
    if request.tools is not None or request.tool_choice is not None:
        prompt_bytes += _check_tools(request)
        if request.tools is not None and request.tool_choice != "none":
            features.append(_TOOLS)
    if request.response_format is not None and request.response_format.type != "text":
        prompt_bytes += _check_format(request)
        features.append(_STRUCTURED)
    if request.modalities is not None and "audio" in request.modalities:
        raise unsupported("modalities", "audio", "Audio answers are not supported. Ask for the modality 'text'.")
    return tuple(features), prompt_bytes


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _check_messages(messages: list[Message]) -> tuple[int, bool]:
    """(bytes of text, whether there are images)."""
    total, vision = 0, False
    for index, message in enumerate(messages):
        content = message.content
        total += _ROLE_BYTES
        if isinstance(content, str):
            total += _bytes(content)
        elif content is not None:
            size, images = _check_parts(index, content)
            total += size
            vision = vision or images
        elif message.role in _MUST_HAVE_CONTENT:
            raise bad(
                f"messages[{index}].content",
                f"Missing required parameter: 'messages[{index}].content'. A {message.role} message needs text.",
            )
        if message.role == "tool" and not message.tool_call_id:
            raise bad(
                f"messages[{index}].tool_call_id",
                f"Missing required parameter: 'messages[{index}].tool_call_id'. Give the id of the tool call that this message answers.",
            )
        if message.role == "assistant":
            total += _check_assistant(index, message)
    return total, vision


def _check_parts(index: int, parts: list[ContentPart]) -> tuple[int, bool]:
    total, vision = 0, False
    if not parts:
        raise bad(
            f"messages[{index}].content",
            f"'messages[{index}].content' is an empty list. Give at least one part, or a string.",
        )
    for place, part in enumerate(parts):
        where = f"messages[{index}].content[{place}]"
        if part.type == "text":
            if part.text is None:
                raise bad(
                    f"{where}.text",
                    f"Missing required parameter: '{where}.text'. A part of type 'text' holds its text there.",
                )
            total += _bytes(part.text)
        elif part.type == "image_url":
            if part.image_url is None:
                raise bad(
                    f"{where}.image_url", f'Missing required parameter: \'{where}.image_url\'. Give {{"url": "..."}}.'
                )
            if not part.image_url.url.startswith(("https://", "http://", "data:image/")):
                raise bad(f"{where}.image_url.url", f"'{where}.image_url.url' is not an http, https or data:image URL.")
            vision = True
        elif part.type == "refusal":
            total += _bytes(part.refusal or "")
        else:
            raise unsupported(
                f"{where}.type",
                part.type,
                f"Content of type '{part.type}' is not supported by any model here. Send text or images.",
            )
    return total, vision


def _check_assistant(index: int, message: Message) -> int:
    total = 0
    if message.tool_calls:
        for call in message.tool_calls:
            if call.function is not None:
                total += _bytes(call.function.name) + _bytes(call.function.arguments) + _ROLE_BYTES
    elif message.content is None and message.refusal is None and message.function_call is None:
        raise bad(
            f"messages[{index}].content",
            f"'messages[{index}]' has neither 'content' nor 'tool_calls'. An assistant message needs one of them.",
        )
    return total


def _check_tools(request: ChatRequest) -> int:
    choice, tools = request.tool_choice, request.tools
    if tools is None:
        if choice in (None, "none", "auto"):
            return 0
        raise bad("tool_choice", "'tool_choice' is only allowed when 'tools' are given. Add tools or leave it out.")
    total, names = 0, set()
    for index, tool in enumerate(tools):
        function = tool.function
        parameters = bytes(function.parameters)
        if parameters and parameters[:1] != b"{" and parameters != b"null":
            where = f"tools[{index}].function.parameters"
            raise bad(
                where,
                f'\'{where}\' is not a JSON schema object. Give for example {{"type": "object", "properties": {{}}}}.',
            )
        if function.name in names:
            raise bad(
                f"tools[{index}].function.name",
                f"'tools[{index}].function.name' repeats an earlier tool's name. Names must differ.",
            )
        names.add(function.name)
        total += _bytes(function.name) + _bytes(function.description or "") + len(parameters) + 4 * _ROLE_BYTES
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise bad(
            "tool_choice.function.name",
            "'tool_choice' names a function that is not among 'tools'. Use one of their names.",
        )
    return total


def _check_format(request: ChatRequest) -> int:
    asked = request.response_format
    if asked is None or asked.type != "json_schema":
        return 0
    if asked.json_schema is None:
        raise bad(
            "response_format.json_schema",
            'Missing required parameter: \'response_format.json_schema\'. Give {"name": "...", "schema": {...}}.',
        )
    schema = bytes(asked.json_schema.schema)
    if schema and schema[:1] != b"{":
        raise bad(
            "response_format.json_schema.schema", "'response_format.json_schema.schema' is not a JSON schema object."
        )
    return len(schema)
