"""Clocks and identifiers."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh_runtime import ids
from gpumesh_runtime.clock import Clock, FakeClock, SystemClock


def test_the_fake_clock_moves_only_when_told() -> None:
    clock = FakeClock()
    clock.advance(1.5)
    assert clock.now() == datetime(2026, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC)
    assert clock.monotonic() == 1001.5
    assert clock.now_ns() == round(clock.now().timestamp() * 1e9)
    clock.step_wall(-3600)
    assert clock.monotonic() == 1001.5
    with pytest.raises(ValueError, match="back"):
        clock.advance(-1)


def test_the_system_clock_is_utc_and_monotonic() -> None:
    clock: Clock = SystemClock()
    assert clock.now().utcoffset() == timedelta(0)
    assert abs(clock.now_ns() / 1e9 - clock.now().timestamp()) < 5
    assert clock.monotonic() <= clock.monotonic()


@given(st.binary(min_size=0, max_size=40))
def test_base62_is_reversible_and_its_length_depends_on_the_size_only(data: bytes) -> None:
    text = ids.base62(data)
    assert len(text) == ids.base62_width(len(data))
    assert ids.from_base62(text, len(data)) == data


@pytest.mark.parametrize("text", ["", "a", "zzzzzz", "00000-", "0000000"])
def test_what_is_not_base62_of_that_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"wrong length|not base62|out of range"):
        ids.from_base62(text, 4)


def test_ids_are_distinct_and_say_what_they_name() -> None:
    made = {ids.new_id("acct") for _ in range(1000)}
    assert len(made) == 1000
    assert all(name.startswith("acct_") and len(name) == 22 for name in made)
    assert len(ids.new_job_id()) == ids.JOB_ID_BYTES == 16
    assert len(ids.job_id_text(ids.new_job_id())) == 32


def test_the_checksum_is_crc32_in_six_characters() -> None:
    assert ids.base62_width(32) == 43
    assert len(ids.crc32_text("gm_live_x")) == 6
    assert (
        int.from_bytes(ids.from_base62(ids.crc32_text("123456789"), 4), "big") == 0xCBF43926
    )  # the check value of CRC-32/ISO-HDLC
