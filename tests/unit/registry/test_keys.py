"""API keys: their format, their checksum, and what a lookup answers."""

import re
from datetime import UTC, datetime

import pytest

from gpumesh_registry.domain import keys
from gpumesh_registry.domain.keys import ApiKey, KeyRecord
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.ids import crc32_text

SECRET = bytes(range(32))


def record(text: str, *, revoked: bool = False, suspended: bool = False) -> KeyRecord:
    return KeyRecord("k1", "acct_a", keys.digest(text), revoked, suspended)


def reason_of(found: KeyRecord | None, text: str) -> Reason:
    with pytest.raises(MeshError) as caught:
        keys.identify(found, keys.digest(text))
    return caught.value.reason


def test_a_key_names_its_id_and_ends_with_a_checksum_over_the_rest() -> None:
    text = keys.make("k1", SECRET)
    assert re.fullmatch(r"gm_live_k1_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}", text)
    body, _, checksum = text.rpartition("_")
    assert checksum == crc32_text(body)


def test_a_secret_of_another_length_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        keys.make("k1", b"short")


def test_a_key_that_works_is_identified_and_may_be_cached_for_15_minutes() -> None:
    text = keys.make("k1", SECRET)
    identity = keys.identify(record(text), keys.digest(text))
    assert (identity.key_id, identity.account_id, identity.cache_seconds) == ("k1", "acct_a", 900)


def test_an_unknown_id_and_a_wrong_secret_look_the_same() -> None:
    text = keys.make("k1", SECRET)
    assert reason_of(None, text) is Reason.INVALID_API_KEY
    assert reason_of(record(text), keys.make("k1", bytes(32))) is Reason.INVALID_API_KEY


def test_only_who_has_the_key_learns_that_it_was_revoked() -> None:
    text = keys.make("k1", SECRET)
    assert reason_of(record(text, revoked=True), text) is Reason.REVOKED_API_KEY
    assert reason_of(record(text, revoked=True), keys.make("k1", bytes(32))) is Reason.INVALID_API_KEY


def test_a_suspended_account_is_told_so() -> None:
    text = keys.make("k1", SECRET)
    assert reason_of(record(text, suspended=True), text) is Reason.ACCOUNT_SUSPENDED


def test_hashes_do_not_appear_when_records_are_printed() -> None:
    text = keys.make("k1", SECRET)
    stored = ApiKey("k1", "acct_a", "n", keys.digest(text), datetime(2026, 1, 1, tzinfo=UTC))
    assert "sha256" not in repr(stored)
    assert "sha256" not in repr(record(text))
