"""How readers' copies follow the state."""

from gpumesh.registry.v1.directory_service_pb2 import Directory
from gpumesh_registry import wire
from gpumesh_registry.domain.catalogue import ModelEntry
from gpumesh_registry.domain.directory import Change, DirectoryState, difference, whole

MODEL = ModelEntry("m", revision="1", context_tokens=10, modalities=(1,))


def applied(state: DirectoryState, changes: list[Change]) -> DirectoryState:
    """What a reader that keeps everything has after the changes."""
    for change in changes:
        state = DirectoryState(
            models=state.models if change.models is None else change.models,
            revoked_keys=state.revoked_keys | set(change.revoked_keys),
            suspended_accounts=(state.suspended_accounts | set(change.suspended_accounts))
            - set(change.restored_accounts),
            revoked_nodes=state.revoked_nodes | set(change.revoked_nodes),
        )
    return state


def test_a_new_reader_gets_the_catalogue_even_when_it_is_empty() -> None:
    (change,) = whole(DirectoryState())
    message = Directory.FromString(wire.change_to_wire(change))
    assert message.catalogue_whole
    assert not message.models


def test_a_change_carries_only_what_changed() -> None:
    old = DirectoryState(models=(MODEL,), revoked_keys=frozenset({"a"}), suspended_accounts=frozenset({"x", "y"}))
    new = DirectoryState(models=(MODEL,), revoked_keys=frozenset({"a", "b"}), suspended_accounts=frozenset({"y", "z"}))
    (change,) = difference(old, new)
    assert change == Change(None, ("b",), ("z",), ("x",), ())


def test_nothing_is_sent_when_a_revocation_only_grew_old() -> None:
    assert difference(DirectoryState(revoked_keys=frozenset({"a"})), DirectoryState()) == []


def test_a_large_state_travels_in_items_of_bounded_size_and_arrives_whole() -> None:
    models = tuple(ModelEntry(f"m{n}" + "x" * 100, revision="1", aliases=("y" * 120,) * 2) for n in range(300))
    state = DirectoryState(
        models=models,
        revoked_keys=frozenset(f"{n:032}" for n in range(5000)),
        suspended_accounts=frozenset(f"acct_{n:040}" for n in range(700)),
        revoked_nodes=frozenset(f"node_{n:058}" for n in range(900)),
    )
    changes = whole(state)
    assert all(len(wire.change_to_wire(change)) <= 256 * 1024 for change in changes)
    assert applied(DirectoryState(), changes) == state
