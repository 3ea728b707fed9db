"""The journal: what was written is there after any crash, and damage never takes more than the record it hit."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpumesh_node.domain.deltas import Usage
from gpumesh_node.domain.job import Outcome, Receipt
from gpumesh_node.domain.records import (
    SEGMENT_HEAD,
    Counter,
    Drop,
    Put,
    encode_counter,
    encode_drop,
    encode_put,
    scan,
)
from gpumesh_node.journal import Journal, JournalError


def receipt(number: int, token: bytes = b"token") -> Receipt:
    """A receipt of job `number`."""
    return Receipt(number.to_bytes(16, "big"), 65537, token, Outcome.COMPLETED, Usage(number, 2, 3, 4))


def segment(folder: Path) -> Path:
    """The newest segment."""
    return max(folder.glob("receipts.*.log"))


_receipts = st.builds(
    Receipt,
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**63),
    st.binary(max_size=600),
    st.sampled_from(Outcome),
    st.builds(Usage, *[st.integers(0, 2**62)] * 4),
)


@given(_receipts, st.integers(0, 2**40), st.integers(0, 2**63))
def test_records_come_back_as_they_were(given_receipt: Receipt, wall: int, counter: int) -> None:
    key = (given_receipt.job_id, given_receipt.fence)
    data = SEGMENT_HEAD + encode_put(given_receipt, wall) + encode_drop(key) + encode_counter(counter)
    assert [record for record, _ in scan(data)] == [Put(given_receipt, wall), Drop(key), Counter(counter)]


def test_a_cut_at_any_byte_loses_only_what_was_cut() -> None:
    parts = [encode_put(receipt(number), 0) for number in range(4)]
    data = SEGMENT_HEAD + b"".join(parts)
    ends = [len(SEGMENT_HEAD) + sum(len(part) for part in parts[:count]) for count in range(5)]
    for cut in range(len(data) + 1):
        whole = max((count for count in range(5) if ends[count] <= cut), default=0)
        assert len(list(scan(data[:cut]))) == whole


def test_a_flipped_bit_anywhere_is_found() -> None:
    data = SEGMENT_HEAD + encode_put(receipt(1), 0) + encode_put(receipt(2), 0)
    good = [record for record, _ in scan(data)]
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        found = [record for record, _ in scan(bytes(damaged))]
        assert found == good[: len(found)]
        assert len(found) < len(good)


@given(st.binary(max_size=300))
def test_any_bytes_can_be_scanned(data: bytes) -> None:
    list(scan(data))
    list(scan(SEGMENT_HEAD + data))


def test_receipts_and_counter_survive_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert journal.next_session() == 1
    for number in range(3):
        assert journal.put(receipt(number))
    assert journal.drop(receipt(1).job_id, 65537)
    assert not journal.drop(receipt(1).job_id, 65537)
    journal.close()
    again = Journal(tmp_path / "journal")
    assert list(again.receipts()) == [receipt(0), receipt(2)]
    assert again.holds(receipt(2).job_id)
    assert not again.holds(receipt(1).job_id)
    assert again.next_session() == 2
    again.close()


def test_a_crash_after_any_byte_of_the_last_write_keeps_the_rest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.next_session()
    journal.put(receipt(1))
    path = segment(tmp_path / "journal")
    before = path.stat().st_size
    journal.put(receipt(2, b"x" * 50))
    content = path.read_bytes()
    journal.close()
    for cut in range(before, len(content) + 1):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / path.name).write_bytes(content[:cut])
        crashed = Journal(folder)
        expected = [receipt(1), receipt(2, b"x" * 50)] if cut == len(content) else [receipt(1)]
        assert list(crashed.receipts()) == expected
        assert crashed.put(receipt(3))
        crashed.close()
        after = Journal(folder)
        assert list(after.receipts()) == [*expected, receipt(3)]
        assert after.next_session() == 2
        after.close()


def test_a_process_that_was_killed_loses_nothing_that_was_written(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # the child writes and dies without closing anything
        journal = Journal(tmp_path / "journal")
        journal.put(receipt(7))
        os._exit(9)
    os.waitpid(pid, 0)
    journal = Journal(tmp_path / "journal")
    assert list(journal.receipts()) == [receipt(7)]
    journal.close()


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "journal").iterdir()} == {0o600}
    journal.close()


def test_two_processes_cannot_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(JournalError, match="another node process"):
        Journal(tmp_path / "journal")
    journal.close()
    Journal(tmp_path / "journal").close()


async def test_a_full_segment_makes_room_for_the_next_and_keeps_what_is_open(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, rotate_bytes=4000)
    first = segment(folder)
    journal.put(receipt(0))
    for number in range(1, 100):
        journal.put(receipt(number))
        journal.drop(receipt(number).job_id, 65537)
    await journal.sync()
    assert segment(folder) != first
    assert not first.exists()
    assert journal.size < 1000
    assert list(journal.receipts()) == [receipt(0)]
    journal.close()
    again = Journal(folder)
    assert list(again.receipts()) == [receipt(0)]
    again.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_any_history_replays_to_the_same_state(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder, rotate_bytes=300)
    expected: dict[int, Receipt] = {}
    for number, put in history:
        if put:
            journal.put(receipt(number))
            expected[number] = receipt(number)
        else:
            journal.drop(receipt(number).job_id, 65537)
            expected.pop(number, None)
    journal.close()
    again = Journal(folder)
    assert sorted(again.receipts(), key=lambda item: item.job_id) == [expected[number] for number in sorted(expected)]
    again.close()


def test_receipts_that_nobody_can_settle_are_forgotten(tmp_path: Path) -> None:
    now = [1_000_000.0]
    journal = Journal(tmp_path / "journal", wall=lambda: now[0])
    journal.put(receipt(1))
    now[0] += 6 * 24 * 3600
    journal.put(receipt(2))
    assert journal.older_than(3600) == [receipt(1)]
    now[0] += 2 * 24 * 3600
    assert journal.drop_expired() == 1
    assert list(journal.receipts()) == [receipt(2)]
    journal.close()


def test_a_full_disk_is_told_and_leaves_whole_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.put(receipt(1))
    os.close(journal._file)
    journal._file = os.open("/dev/full", os.O_WRONLY)
    assert not journal.put(receipt(2))
    assert journal.failed
    journal.close()
    again = Journal(tmp_path / "journal")
    assert list(again.receipts()) == [receipt(1)]
    again.close()
