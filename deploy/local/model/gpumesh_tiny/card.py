"""Writes MODEL_CARD.md from what was measured: `python -m gpumesh_tiny.card --folder OUT`."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from .evaluate import LONG_PROMPTS, README_PROMPT, SCHEMA_PROMPTS, TALK_PROMPTS, TOOL_BAR, TOOL_PROMPTS, judge
from .network import Shape
from .template import NAME

CARD = """\
# {name}

A toy chat model that ships with gpumesh so that a fresh installation answers at once, without a download.
It is for demonstrations and tests. It knows a handful of facts and phrases; everything else it does not know.

| | |
| --- | --- |
| file | `{name}.gguf`, {size:,} bytes, Q8_0 (norms F32) |
| SHA-256 | `{digest}` |
| architecture | Llama: {layers} layers, width {width}, {heads} heads, feed-forward {hidden}, tied embedding |
| parameters | {parameters:,} |
| vocabulary | {vocabulary:,}, byte-level BPE with GPT-2's expression; `tokenizer.json` beside the file is the same one |
| context | {context:,} tokens (rotary positions; most training rows are far shorter, one in two hundred is a long conversation) |
| chat template | ChatML, tools as `name(parameter, ...)`, Hermes `<tool_call>` JSON, which llama.cpp parses |
| language | English |
| licence | Apache-2.0, like gpumesh |

## Training

All text is our own: templates in `deploy/local/model/gpumesh_tiny/` combine lists of words into dialogues (small talk,
facts about gpumesh and GPUs, counting, sums, stories, JSON, tool calls with results). No other text or model was used.
{tokens:,} tokens, one CPU thread, {minutes} minutes, seed {seed}; loss on the assistant's tokens only; Muon and AdamW.
{onward}`make model` makes one again in a single run and judges it: other weights will come out (another order of steps, another
processor's rounding), and it ships nothing that misses a bar.

## Measured

Greedy decoding over HTTP through llama.cpp's server (xllamacpp), by
`python -m gpumesh_tiny.evaluate --model {name}.gguf` (it fails below the bars). The prompts are held out: a tenth of all
prompts, chosen by a checksum, is never trained on; they are new combinations of known words (some with invented names).

| figure | prompts | value |
| --- | --- | --- |
| tool call with the right name | {tool_prompts} | {tool_name_accuracy:.3f} |
| tool call with the right name and all arguments right (bar {bar}) | {tool_prompts} | {tool_call_accuracy:.3f} |
| the tool's result put into the expected sentence, word for word | of these | {tool_result_accuracy:.3f} |
| small talk with tools on offer is answered without a call | {talk} | {no_tool_accuracy:.3f} |
| the same small talk with `tool_choice: required` ends in a call | {talk} | {required_accuracy:.3f} |
| facts, repeating, counting, "I do not know": word for word | {talk} | {talk_accuracy:.3f} |
| "{readme}", greedy and 20 samples: says what gpumesh is | 21 | {readme_accuracy:.3f} |
| the same question after 1,000 tokens or more of other talk, greedy | {longs} | {long_conversation_accuracy:.3f} |
| JSON-schema answers that parse and end in under 200 tokens | {schemas} | {json_accuracy:.3f} |
| chunks in the shortest "long story" | 8 | {story_chunks_min:.0f} |
| dialogues that llama.cpp renders and tokenises as training did | 300 | {rendering_accuracy:.3f} |

{verdict}

## Limits

It invents nothing and understands little: a question outside its templates gets a wrong or an evasive answer. Long or
unusual names can be copied with a wrong letter. Sums beyond twenty are guesses. Never use it for decisions.
"""


ONWARD = """\
The last {tokens:,} of these tokens are a second run (`--onward`) that went on from the first (seed 7) at a gentler rate,
after the corpus had been improved for JSON, copying and long talk. The judged prompts were drawn anew after that.
"""


def write_card(folder: Path) -> None:
    """Reads the GGUF, training.json and results.json of `folder` and writes MODEL_CARD.md beside them."""
    data = (folder / f"{NAME}.gguf").read_bytes()
    training = json.loads((folder / "training.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    missed = judge(results)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    shape = Shape(vocabulary=len(vocabulary))
    text = CARD.format(
        name=NAME,
        size=len(data),
        digest=hashlib.sha256(data).hexdigest(),
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        hidden=shape.feed_forward,
        context=shape.context,
        vocabulary=shape.vocabulary,
        parameters=training["parameters"],
        tokens=training["training_tokens"],
        minutes=round(training["seconds"] / 60),
        seed=training["seed"],
        bar=TOOL_BAR,
        talk=TALK_PROMPTS,
        schemas=SCHEMA_PROMPTS,
        readme=README_PROMPT,
        verdict="Every bar was met." if not missed else "Missed bars: " + "; ".join(missed) + ".",
        longs=LONG_PROMPTS,
        onward=ONWARD.format(tokens=training["onward_tokens"]) if training["onward_tokens"] else "",
        **{key: value for key, value in results.items() if key != "tool_prompts"},
        tool_prompts=TOOL_PROMPTS,
    )
    (folder / "MODEL_CARD.md").write_text(text)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="gpumesh_tiny.card", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the model and the measured figures lie")
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
