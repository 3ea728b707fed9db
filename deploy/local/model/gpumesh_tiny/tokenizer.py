"""The tokenizer: byte-level BPE of GPT-2's shape, trained on our corpus, kept as Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from . import words
from .template import CONTROL_TOKENS, MARKER_TOKENS

# Most words of the corpus become one token each; more would go to rare pieces and to the embedding's size.
VOCABULARY = 2560


def _copied_words() -> list[str]:
    """Words that tools copy, often enough to be one token both after a space and after a quotation mark."""
    known = (*words.CITIES, *words.NAMES, *words.CAPITALS, *words.ARTISTS, *words.LANGUAGES, *words.SYMBOLS)
    common = (*words.ANIMALS, *words.COLOURS, *words.THINGS, *words.ROOMS, *words.SUBJECTS, *words.SEARCHES)
    return [f'"{word}" {word}' for word in (*known, *common)] * 60 + [f"{n} {n}" for n in range(100)] * 60


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """BPE over `texts`; ids 0.. are the control tokens, then the markers, then bytes and merges."""
    tokenizer = Tokenizer(BPE())
    # The expression behind use_regex is GPT-2's; llama.cpp applies the same one for `tokenizer.ggml.pre = gpt-2`.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = ByteLevelDecoder()
    specials = [AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS]
    markers = [AddedToken(text, special=False, normalized=False) for text in MARKER_TOKENS]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*specials, *markers],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_copied_words()], trainer)
    # The trainer marks all of them special; the markers are ordinary text that happens to be one token.
    described = json.loads(tokenizer.to_str())
    for entry in described["added_tokens"]:
        entry["special"] = entry["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(described))


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads `tokenizer.json`. Raises OSError-like errors of the library when it is missing or malformed."""
    return Tokenizer.from_file(str(path))
