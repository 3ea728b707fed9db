"""The chat template: one text for the GGUF (Jinja, read by llama.cpp) and one renderer for training (Python).

ChatML with Hermes tool calls, which llama.cpp recognises and parses into OpenAI `tool_calls`. A tool is listed as
`name(parameter, parameter)` rather than as its JSON schema: a model of a million parameters reads a short signature
well and a page of JSON badly, and llama.cpp's grammar enforces the schema anyway. `verify_rendering` in evaluate.py
checks over HTTP that llama.cpp renders exactly what `render` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

NAME = "gpumesh-tiny"
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
MARKER_TOKENS = ("<tool_call>", "</tool_call>", "<tools>", "</tools>", "<tool_response>", "</tool_response>")

CHAT_TEMPLATE = """\
{%- macro signature(function) -%}
{%- set parameters = function.parameters if function.parameters else {} -%}
{%- set names = parameters.required if parameters.required else parameters.properties -%}
{{- function.name + '(' -}}
{%- for name in names -%}{{- name -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}
{{- ')\\n' -}}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' or messages[0].role == 'developer' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}
{{- '<tools>\\n' -}}
{%- for tool in tools -%}{{- signature(tool.function) -}}{%- endfor -%}
{{- '</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'system' if message.role == 'developer' else message.role -%}
{%- if role == 'system' and loop.first and tools -%}
{%- elif role == 'tool' -%}
{{- '<|im_start|>tool\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + role + '\\n' -}}
{%- if message.content -%}{{- message.content -}}{%- endif -%}
{%- if role == 'assistant' and message.tool_calls -%}
{%- for call in message.tool_calls -%}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def signature(tool: Tool) -> str:
    """One tool as `name(parameter, parameter)`; only required parameters where the schema names any."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    names = parameters.get("required") or list(parameters.get("properties") or {})
    return f"{function['name']}({', '.join(names)})"


def tool_call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the assistant writes it; the argument order is the mapping's."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def _role(message: Message) -> str:
    return "system" if message["role"] == "developer" else str(message["role"])


def _body(message: Message) -> str:
    """Everything between the role line and the end of the turn."""
    content = str(message.get("content") or "")
    if message["role"] == "tool":
        return f"<tool_response>{content}</tool_response>"
    calls = "".join(
        tool_call_text(call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    )
    return content + calls


def render_parts(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[tuple[str, bool]]:
    """The dialogue as (text, is the assistant's own) pieces; joined they are what llama.cpp renders."""
    parts: list[tuple[str, bool]] = []
    rest = list(messages)
    if tools:
        head = ""
        if rest and _role(rest[0]) == "system":
            head = str(rest.pop(0)["content"]) + "\n"
        listed = "".join(signature(tool) + "\n" for tool in tools)
        parts.append((f"{TURN_START}system\n{head}<tools>\n{listed}</tools>{TURN_END}\n", False))
    for message in rest:
        role = _role(message)
        parts.append((f"{TURN_START}{role}\n", False))
        parts.append((_body(message) + TURN_END, role == "assistant"))
        parts.append(("\n", False))
    return parts


def render(messages: Sequence[Message], tools: Sequence[Tool] = (), *, generate: bool = False) -> str:
    """The whole text; with `generate` it ends where the assistant is to go on."""
    text = "".join(piece for piece, _ in render_parts(messages, tools))
    return text + f"{TURN_START}assistant\n" if generate else text
