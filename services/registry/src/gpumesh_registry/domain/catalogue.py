"""Entries of the model catalogue and what makes one valid."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from gpumesh_registry.domain.checks import MODEL_ID, SHA256_HEX, invalid
from gpumesh_runtime.error_types import ResourceExhausted
from gpumesh_runtime.reasons import Reason

_TEXT_LIMITS: Final = {"revision": 64, "licence": 64, "quantisation": 32, "owner": 100}
MAX_ALIASES: Final = 16
# Far beyond any model known; it keeps sums of tokens far from 2^63.
MAX_CONTEXT_TOKENS: Final = 100_000_000
MAX_TEMPLATE_OVERHEAD: Final = 10_000
MAX_TOKENIZER_BYTES: Final = 32 * 1024 * 1024
# The whole catalogue travels as one item, which between services may have 256 KiB.
MAX_CATALOGUE_BYTES: Final = 200_000
_ENTRY_OVERHEAD: Final = 96  # numbers, time and field tags of one entry, rounded up


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model. Fields as in gpumesh.common.v1.Model; modalities and features are the numbers of the wire's enums."""

    model_id: str
    revision: str = ""
    aliases: tuple[str, ...] = ()
    context_tokens: int = 0
    licence: str = ""
    modalities: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    quantisation: str = ""
    tokenizer_sha256: str = ""
    max_output_tokens: int = 0
    owner: str = ""
    template_overhead_tokens: int = 0
    create_time: datetime | None = None


def validate(entry: ModelEntry, known_modalities: Iterable[int], known_features: Iterable[int]) -> ModelEntry:
    """The entry in its one form (no repeated aliases, modalities or features). Raises InvalidArgument that names the field."""
    if not MODEL_ID.fullmatch(entry.model_id):
        raise invalid("model.model_id", "model_id must be 1-128 of A-Z, a-z, 0-9 and . _ : / -")
    aliases = tuple(dict.fromkeys(alias for alias in entry.aliases if alias != entry.model_id))
    if len(aliases) > MAX_ALIASES or not all(MODEL_ID.fullmatch(alias) for alias in aliases):
        raise invalid("model.aliases", f"At most {MAX_ALIASES} aliases, each 1-128 of A-Z, a-z, 0-9 and . _ : / -")
    for field, limit in _TEXT_LIMITS.items():
        text: str = getattr(entry, field)
        if len(text) > limit or (text and not text.isprintable()):
            raise invalid(f"model.{field}", f"{field} must be at most {limit} printable characters.")
    if not entry.revision:
        raise invalid(
            "model.revision", "revision must not be empty: nodes serve a model only in the catalogue's revision."
        )
    if not 1 <= entry.context_tokens <= MAX_CONTEXT_TOKENS:
        raise invalid("model.context_tokens", f"context_tokens must be 1 to {MAX_CONTEXT_TOKENS}.")
    if not 0 <= entry.max_output_tokens <= entry.context_tokens:
        raise invalid(
            "model.max_output_tokens", "max_output_tokens must be 0 (what the context leaves) to context_tokens."
        )
    if not 0 <= entry.template_overhead_tokens <= MAX_TEMPLATE_OVERHEAD:
        raise invalid(
            "model.template_overhead_tokens", f"template_overhead_tokens must be 0 to {MAX_TEMPLATE_OVERHEAD}."
        )
    if not entry.modalities or not set(entry.modalities) <= set(known_modalities):
        raise invalid("model.modalities", "modalities must name at least one kind of work that this version knows.")
    if not set(entry.features) <= set(known_features):
        raise invalid("model.features", "features must be ones that this version knows.")
    if entry.tokenizer_sha256 and not SHA256_HEX.fullmatch(entry.tokenizer_sha256):
        raise invalid("model.tokenizer_sha256", "tokenizer_sha256 must be 64 lower-case hex digits, or empty.")
    return replace(
        entry,
        aliases=aliases,
        modalities=tuple(sorted(set(entry.modalities))),
        features=tuple(sorted(set(entry.features))),
    )


def check_size(entries: Iterable[ModelEntry]) -> None:
    """Raises ResourceExhausted when the catalogue would not fit the item in which it travels."""
    total = 0
    for entry in entries:
        texts = (
            entry.model_id,
            entry.revision,
            entry.licence,
            entry.quantisation,
            entry.tokenizer_sha256,
            entry.owner,
            *entry.aliases,
        )
        total += (
            _ENTRY_OVERHEAD
            + sum(len(text.encode()) + 3 for text in texts)
            + len(entry.modalities)
            + len(entry.features)
        )
    if total > MAX_CATALOGUE_BYTES:
        raise ResourceExhausted(
            Reason.RESOURCE_EXHAUSTED, "The catalogue is full; remove models that nobody uses, or shorten aliases."
        )
