"""The shipped model: a small GGUF and its tokenizer, made by deploy/local/model from text of our own."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True)
class Shipped:
    """Its files, and what the catalogue says of it."""

    weights: Path = _FOLDER / "gpumesh-tiny.gguf"
    tokenizer: Path = _FOLDER / "tokenizer.json"
    context_tokens: int = 2048
    quantisation: str = "Q8_0"
    licence: str = "Apache-2.0"
    owner: str = "gpumesh"
    # Role names and turn marks that the chat template adds, per message and at the end; an upper bound.
    template_overhead_tokens: int = 16

    @property
    def revision(self) -> str:
        """Of the weights: new weights are a new revision, so that no node answers with old ones."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]
