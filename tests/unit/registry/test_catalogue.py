"""What makes a model's entry valid."""

from dataclasses import replace
from typing import Any

import pytest

from gpumesh_registry.domain import catalogue
from gpumesh_registry.domain.catalogue import ModelEntry
from gpumesh_runtime.errors import InvalidArgument, ResourceExhausted

ENTRY = ModelEntry("org/model:7b", revision="r1", context_tokens=4096, modalities=(1,), tokenizer_sha256="a" * 64)


def validate(entry: ModelEntry) -> ModelEntry:
    return catalogue.validate(entry, known_modalities={1, 2, 3}, known_features={1, 2})


def test_a_valid_entry_gets_its_one_form() -> None:
    entry = validate(replace(ENTRY, aliases=("b", "a", "b", "org/model:7b"), modalities=(2, 1, 2), features=(2, 2, 1)))
    assert entry.aliases == ("b", "a")
    assert entry.modalities == (1, 2)
    assert entry.features == (1, 2)


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("model_id", {"model_id": ""}),
        ("model_id", {"model_id": "a b"}),
        ("model_id", {"model_id": "m" * 129}),
        ("aliases", {"aliases": ("with space",)}),
        ("aliases", {"aliases": tuple(f"a{n}" for n in range(17))}),
        ("revision", {"revision": ""}),
        ("revision", {"revision": "r" * 65}),
        ("licence", {"licence": "two\nlines"}),
        ("context_tokens", {"context_tokens": 0}),
        ("context_tokens", {"context_tokens": 100_000_001}),
        ("max_output_tokens", {"max_output_tokens": 4097}),
        ("max_output_tokens", {"max_output_tokens": -1}),
        ("template_overhead_tokens", {"template_overhead_tokens": -1}),
        ("modalities", {"modalities": ()}),
        ("modalities", {"modalities": (9,)}),
        ("features", {"features": (0,)}),
        ("tokenizer_sha256", {"tokenizer_sha256": "A" * 64}),
        ("tokenizer_sha256", {"tokenizer_sha256": "abc"}),
    ],
)
def test_a_wrong_field_is_named(param: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate(replace(ENTRY, **change))
    assert caught.value.metadata == {"param": f"model.{param}"}


def test_a_catalogue_that_would_not_fit_its_item_is_refused() -> None:
    catalogue.check_size([ENTRY] * 500)
    with pytest.raises(ResourceExhausted):
        catalogue.check_size([replace(ENTRY, aliases=("x" * 128,) * 16)] * 100)
