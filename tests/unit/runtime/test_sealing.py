"""Seals: one ring of keys in a file, shared by processes, rotated without a restart."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gpumesh_runtime.sealing import KeyRing, KeyRingError, create_file, rotate_file


class Hands:
    """Wall and monotonic time under the test's control."""

    def __init__(self) -> None:
        self.wall = 2_000_000_000.0
        self.monotonic = 0.0

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "ring.json"
    create_file(made)
    return made


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def ring(path: Path, hands: Hands) -> KeyRing:
    return KeyRing(path, wall=lambda: hands.wall, monotonic=lambda: hands.monotonic)


def test_what_one_process_seals_another_verifies(path: Path, ring: KeyRing) -> None:
    key_id, mac = ring.seal(b"gpumesh-ticket-v1", b"body")
    assert len(mac) == 32
    assert KeyRing(path).verify(b"gpumesh-ticket-v1", key_id, b"body", mac)


def test_another_body_context_key_or_mac_is_refused(ring: KeyRing) -> None:
    key_id, mac = ring.seal(b"gpumesh-ticket-v1", b"body")
    assert not ring.verify(b"gpumesh-ticket-v1", key_id, b"Body", mac)
    assert not ring.verify(b"gpumesh-receipt-v1", key_id, b"body", mac)
    assert not ring.verify(b"gpumesh-ticket-v1", "other", b"body", mac)
    assert not ring.verify(b"gpumesh-ticket-v1", key_id, b"body", mac[:-1])
    assert not ring.verify(b"gpumesh-ticket-v1", key_id, b"body", b"")


def test_a_new_key_seals_only_from_its_time_on_and_old_seals_stay_good(path: Path, ring: KeyRing, hands: Hands) -> None:
    old_id, old_mac = ring.seal(b"c", b"b")
    entries = json.loads(path.read_text())["keys"]
    new = {"id": "new", "secret_b64": "A" * 43 + "=", "not_before": hands.wall + 60}
    path.write_text(json.dumps({"keys": [*entries, new]}))
    hands.pass_s(2)
    assert ring.seal(b"c", b"b")[0] == old_id
    hands.pass_s(60)
    key_id, mac = ring.seal(b"c", b"b")
    assert key_id == "new"
    assert ring.verify(b"c", old_id, b"b", old_mac)
    assert ring.verify(b"c", key_id, b"b", mac)


def test_a_key_that_is_removed_verifies_no_more(path: Path, ring: KeyRing, hands: Hands) -> None:
    key_id, mac = ring.seal(b"c", b"b")
    path.write_text(json.dumps({"keys": [{"id": "n", "secret_b64": "A" * 43 + "=", "not_before": 0}]}))
    hands.pass_s(2)
    assert not ring.verify(b"c", key_id, b"b", mac)


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_text("{"), lambda path: path.unlink()], ids=["half written", "gone"]
)
def test_a_damaged_file_leaves_the_keys_as_they_were(
    path: Path, ring: KeyRing, hands: Hands, damage: Callable[[Path], object]
) -> None:
    key_id, mac = ring.seal(b"c", b"b")
    damage(path)
    hands.pass_s(2)
    assert ring.verify(b"c", key_id, b"b", mac)
    assert ring.seal(b"c", b"b") == (key_id, mac)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"keys": []}',
        '{"keys": [{"id": "a"}]}',
        '{"keys": [{"id": "a", "secret_b64": "c2hvcnQ=", "not_before": 0}]}',
    ],
)
def test_a_bad_ring_at_the_start_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(KeyRingError, match=r"bad\.json"):
        KeyRing(path)


def test_the_file_is_private_made_once_and_rotation_keeps_the_newest(path: Path) -> None:
    before = path.read_text()
    create_file(path)
    assert path.read_text() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for _ in range(4):
        rotate_file(path, keep=3)
    assert len(json.loads(path.read_text())["keys"]) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208 -- names are what is compared


def test_secrets_do_not_show(ring: KeyRing) -> None:
    assert "secret" not in repr(ring._keys)
