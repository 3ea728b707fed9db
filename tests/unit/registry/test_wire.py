"""Records survive the way over the wire."""

from datetime import UTC, datetime

from gpumesh.common.v1.job_pb2 import Model
from gpumesh_registry import wire
from gpumesh_registry.domain.catalogue import ModelEntry
from gpumesh_registry.domain.keys import ApiKey

NOW = datetime(2026, 2, 3, 4, 5, 6, 789_000, tzinfo=UTC)


def test_a_model_comes_back_as_it_went() -> None:
    entry = ModelEntry(
        "m", "r", ("a", "b"), 4096, "Apache-2.0", (1, 2), (1,), "F16", "f" * 64, 512, "someone", 7, create_time=NOW
    )
    assert wire.model_from_wire(Model.FromString(wire.model_to_wire(entry).SerializeToString())) == entry


def test_a_model_with_nothing_set_is_read_without_error() -> None:
    assert wire.model_from_wire(Model()) == ModelEntry("")


def test_a_key_on_the_wire_holds_no_hash() -> None:
    key = ApiKey("k", "acct_a", "n", b"h" * 32, NOW, None)
    message = wire.key_to_wire(key)
    assert b"hhhh" not in message.SerializeToString()
    assert not message.HasField("revoke_time")
    assert wire.time_from_wire(message.create_time) == NOW
