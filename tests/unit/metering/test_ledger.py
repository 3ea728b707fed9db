"""The ledger's core: two-phase transfers, checked step by step and by a state machine against a naive model."""

import uuid

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from gpumesh_metering.domain.accounts import BUYER_AVAILABLE, BUYER_LEASED, PROVIDER_PENDING, Account
from gpumesh_metering.domain.invariants import SettledJob, violations
from gpumesh_metering.domain.ledger import INT64_MAX, Ledger, LedgerError, Refusal, Transfer, TransferKind, fold
from gpumesh_metering.domain.transfer_ids import SETTLE_PAY, TransferIds, pay_key

WORLD = Account("external:bank", "bank")
BUYER = Account(BUYER_AVAILABLE, "b1")
LEASED = Account(BUYER_LEASED, "b1")
PROVIDER = Account(PROVIDER_PENDING, "p1")


def transfer(
    kind: TransferKind,
    debit: Account,
    credit: Account,
    amount: int,
    pending: uuid.UUID | None = None,
    id_: uuid.UUID | None = None,
) -> Transfer:
    return Transfer(id_ or uuid.uuid4(), kind, debit, credit, amount, "test", pending)


def funded(amount: int = 100) -> Ledger:
    ledger = Ledger()
    ledger.apply(transfer(TransferKind.DIRECT, WORLD, BUYER, amount))
    return ledger


def refusal(ledger: Ledger, wrong: Transfer) -> str:
    before = {account: (b.posted, b.reserved, b.version) for account, b in ledger.balances.items()}
    with pytest.raises(LedgerError) as caught:
        ledger.apply(wrong)
    assert {account: (b.posted, b.reserved, b.version) for account, b in ledger.balances.items()} == before
    return caught.value.code


def test_pending_reserves_and_post_moves_less_and_frees_the_rest() -> None:
    ledger = funded(100)
    held = transfer(TransferKind.PENDING, BUYER, PROVIDER, 80)
    ledger.apply(held)
    assert (ledger.available(BUYER), ledger.balances[BUYER].posted, ledger.available(PROVIDER)) == (20, 100, 0)
    ledger.apply(transfer(TransferKind.POST, BUYER, PROVIDER, 30, held.id))
    assert (ledger.available(BUYER), ledger.available(PROVIDER)) == (70, 30)


def test_void_frees_everything() -> None:
    ledger = funded(100)
    held = transfer(TransferKind.PENDING, BUYER, PROVIDER, 80)
    ledger.apply(held)
    ledger.apply(transfer(TransferKind.VOID, BUYER, PROVIDER, 0, held.id))
    assert (ledger.available(BUYER), ledger.available(PROVIDER)) == (100, 0)


def test_pending_resolves_at_most_once_and_for_at_most_its_amount() -> None:
    ledger = funded(100)
    held = transfer(TransferKind.PENDING, BUYER, PROVIDER, 80)
    ledger.apply(held)
    assert refusal(ledger, transfer(TransferKind.POST, BUYER, PROVIDER, 81, held.id)) == Refusal.OVERPOST
    ledger.apply(transfer(TransferKind.POST, BUYER, PROVIDER, 80, held.id))
    for again in (TransferKind.POST, TransferKind.VOID):
        amount = 0 if again is TransferKind.VOID else 1
        assert refusal(ledger, transfer(again, BUYER, PROVIDER, amount, held.id)) == Refusal.RESOLVED


def test_post_needs_a_pending_transfer_between_the_same_accounts() -> None:
    ledger = funded(100)
    direct = transfer(TransferKind.DIRECT, BUYER, PROVIDER, 1)
    ledger.apply(direct)
    held = transfer(TransferKind.PENDING, BUYER, PROVIDER, 1)
    ledger.apply(held)
    for pending, credit in ((uuid.uuid4(), PROVIDER), (direct.id, PROVIDER), (held.id, LEASED)):
        assert refusal(ledger, transfer(TransferKind.POST, BUYER, credit, 1, pending)) == Refusal.NO_PENDING


def test_buyer_cannot_spend_what_is_reserved() -> None:
    ledger = funded(100)
    ledger.apply(transfer(TransferKind.PENDING, BUYER, PROVIDER, 80))
    assert refusal(ledger, transfer(TransferKind.DIRECT, BUYER, PROVIDER, 21)) == Refusal.OVERDRAWN
    assert refusal(ledger, transfer(TransferKind.PENDING, BUYER, PROVIDER, 21)) == Refusal.OVERDRAWN
    ledger.apply(transfer(TransferKind.DIRECT, BUYER, PROVIDER, 20))


def test_repeating_a_transfer_changes_nothing_and_another_under_its_id_is_a_conflict() -> None:
    ledger = Ledger()
    first = transfer(TransferKind.DIRECT, WORLD, BUYER, 5)
    assert [ledger.apply(first) for _ in range(3)] == [True, False, False]
    assert ledger.available(BUYER) == 5
    assert refusal(ledger, transfer(TransferKind.DIRECT, WORLD, BUYER, 6, id_=first.id)) == Refusal.CONFLICT


@pytest.mark.parametrize("amount", [0, -1, INT64_MAX + 1, -(2**63)])
def test_amounts_out_of_range_are_refused(amount: int) -> None:
    assert refusal(Ledger(), transfer(TransferKind.DIRECT, WORLD, BUYER, amount)) == Refusal.AMOUNT


def test_balances_stay_inside_int64() -> None:
    ledger = funded(INT64_MAX)
    assert refusal(ledger, transfer(TransferKind.DIRECT, Account("external:x", "x"), BUYER, 1)) == Refusal.OVERFLOW


@pytest.mark.parametrize(
    "wrong", [Account("buyer:gold", "b"), Account("external:", "b"), Account(BUYER_AVAILABLE, ""), WORLD]
)
def test_unknown_accounts_and_transfers_to_oneself_are_refused(wrong: Account) -> None:
    assert refusal(Ledger(), transfer(TransferKind.DIRECT, WORLD, wrong, 1)) == Refusal.ACCOUNT


def test_ids_are_version_five_and_equal_to_the_library() -> None:
    ids = TransferIds("test.kind")
    for key in (b"", b"a", bytes(range(40))):
        digest = uuid.uuid5(ids.namespace, key.decode("latin-1")) if key.isascii() else None
        made = ids.id(key)
        assert (made.version, made.variant) == (5, uuid.RFC_4122)
        assert digest is None or made == digest
    assert SETTLE_PAY.id(pay_key(bytes(16), 1)) != SETTLE_PAY.id(pay_key(bytes(16), 2))


def test_checker_names_each_kind_of_damage() -> None:
    ledger = funded(100)
    assert violations(ledger.transfers.values(), ledger.balances, []) == []
    ledger.balances[BUYER].posted = 99
    found = " ".join(violations(ledger.transfers.values(), ledger.balances, []))
    assert "I1:" in found
    assert "I7:" in found
    ledger.balances[BUYER].posted = -1
    job = SettledJob(bytes(16), "b1", 10, 2, [(1, 0, 5, "p", 7), (1, 6, 8, "p", 0)])
    found = " ".join(violations(ledger.transfers.values(), ledger.balances, [job]))
    assert "I2:" in found
    assert "I4:" in found
    assert "I5:" in found


ACCOUNTS = [WORLD, BUYER, LEASED, PROVIDER, Account(BUYER_AVAILABLE, "b2"), Account("platform:fees", "platform")]


class LedgerMachine(RuleBasedStateMachine):
    """Random transfers; whatever the ledger takes keeps the invariants, whatever it refuses changes nothing."""

    pendings: Bundle[Transfer] = Bundle("pendings")

    @initialize()
    def start(self) -> None:
        self.ledger = Ledger()

    def apply(self, line: Transfer) -> bool:
        balances = {account: (b.posted, b.reserved) for account, b in self.ledger.balances.items()}
        try:
            return self.ledger.apply(line)
        except LedgerError:
            assert {account: (b.posted, b.reserved) for account, b in self.ledger.balances.items()} == balances
            return False

    @rule(
        debit=st.sampled_from(ACCOUNTS),
        credit=st.sampled_from(ACCOUNTS),
        amount=st.integers(-1, 1000) | st.just(10**15),
    )
    def direct(self, debit: Account, credit: Account, amount: int) -> None:
        self.apply(transfer(TransferKind.DIRECT, debit, credit, amount))

    @rule(
        target=pendings, debit=st.sampled_from(ACCOUNTS), credit=st.sampled_from(ACCOUNTS), amount=st.integers(1, 1000)
    )
    def reserve(self, debit: Account, credit: Account, amount: int) -> MultipleResults[Transfer] | Transfer:
        line = transfer(TransferKind.PENDING, debit, credit, amount)
        return line if self.apply(line) else multiple()

    @rule(held=consumes(pendings), part=st.floats(0, 1.2), repeat=st.booleans())
    def resolve(self, held: Transfer, part: float, repeat: bool) -> None:
        amount = int(held.amount * part)
        kind = TransferKind.POST if amount else TransferKind.VOID
        line = transfer(kind, held.debit, held.credit, amount, held.id)
        took = self.apply(line)
        assert took == (amount <= held.amount)
        if took and repeat:
            assert not self.ledger.apply(line)
            with pytest.raises(LedgerError):
                self.ledger.apply(transfer(TransferKind.VOID, held.debit, held.credit, 0, held.id))

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        if self.ledger.transfers:
            assert not self.ledger.apply(data.draw(st.sampled_from(list(self.ledger.transfers.values()))))

    @invariant()
    def invariants_hold(self) -> None:
        if hasattr(self, "ledger"):
            assert violations(self.ledger.transfers.values(), self.ledger.balances, []) == []

    @invariant()
    def fold_does_not_depend_on_the_order(self) -> None:
        if hasattr(self, "ledger"):
            lines = list(self.ledger.transfers.values())
            forth, back = fold(lines), fold(reversed(lines))
            assert {a: (b.posted, b.reserved) for a, b in forth.items()} == {
                a: (b.posted, b.reserved) for a, b in back.items()
            }


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
