"""Wire conversions are total, and round trips keep every number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.metering.v1.balance_service_pb2 import BalanceUpdate
from gpumesh.metering.v1.ledger_service_pb2 import CreditRequest, ListUsageRequest, SetPriceRequest
from gpumesh.metering.v1.settlement_service_pb2 import Settled
from gpumesh_metering import limits, wire
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.store import BuyerBalance, StoredSettlement
from gpumesh_runtime.errors import InvalidArgument
from tests.support.metering import each_settled

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.builds(Price, INT64, INT64, INT64, st.none() | INT64))
def test_price_survives_the_wire_absence_of_a_cached_price_included(price: Price) -> None:
    assert wire.price_from_wire(wire.price_to_wire(price)) == price


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(body: bytes) -> None:
    for read in (wire.settle_from_wire, wire.sealed_from_wire, wire.ticket_from_wire):
        try:
            read(body)
        except wire.WireError:
            continue


def test_stored_settlement_answers_a_receipt_for_its_own_tries_only() -> None:
    stored = StoredSettlement(Price(1, 2, 3), 10, 2, [(5, 3), (6, 5)])
    whole = Settled.FromString(wire.stored_to_wire(stored))
    assert [(pay.fence, pay.pay_nano_usd) for pay in whole.pays] == [(5, 3), (6, 5)]
    assert (whole.charge.amount_nano_usd, whole.charge.fee_nano_usd, whole.charge.provider_nano_usd) == (10, 2, 8)
    part = Settled.FromString(wire.stored_to_wire(stored, frozenset({6, 7})))
    assert [(pay.fence, pay.pay_nano_usd) for pay in part.pays] == [(6, 5), (7, 0)]


def test_updates_carry_balances_and_whole_price_lists() -> None:
    update = BalanceUpdate.FromString(wire.update_to_wire([BuyerBalance("a", 5, 7)]))
    assert (update.balances[0].account_id, update.balances[0].available_nano_usd, update.balances[0].version) == (
        "a",
        5,
        7,
    )
    assert not update.prices_whole
    prices = {"b": Price(2, 3, 4), "a": Price(1, 2, 3, 1)}
    update = BalanceUpdate.FromString(wire.prices_to_wire(prices))
    assert update.prices_whole
    assert {model: wire.price_from_wire(price) for model, price in update.prices.items()} == prices
    assert wire.prices_to_wire(prices) == wire.prices_to_wire(dict(reversed(prices.items())))


@given(st.integers(1, 2**63 - 1))
def test_page_token_survives(number: int) -> None:
    assert wire.page_from_wire(wire.page_token(number)) == number


@pytest.mark.parametrize(
    "token", ["x", "before:", "before:-1", "before:0", "before:1e3", "12", "before:" + "9" * 30, "before:²"]
)
def test_foreign_page_tokens_are_refused(token: str) -> None:
    with pytest.raises(InvalidArgument):
        limits.check_usage(ListUsageRequest(page_token=token))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"amount_nano_usd": 0}, "amount_nano_usd"),
        ({"amount_nano_usd": -1}, "amount_nano_usd"),
        ({"amount_nano_usd": 10**15 + 1}, "amount_nano_usd"),
        ({"amount_nano_usd": -(2**63)}, "amount_nano_usd"),
        ({"account_id": ""}, "account_id"),
        ({"credit_id": ""}, "credit_id"),
        ({"credit_id": "x" * 65}, "credit_id"),
        ({"memo": "m" * 201}, "memo"),
        ({"memo": "a\x00b"}, "memo"),
    ],
)
def test_wrong_credits_name_the_field(fields: dict[str, object], param: str) -> None:
    good = {"account_id": "a", "amount_nano_usd": 1, "credit_id": "c", "memo": ""}
    limits.check_credit(CreditRequest(**good))  # type: ignore[arg-type]  # a dict
    with pytest.raises(InvalidArgument) as caught:
        limits.check_credit(CreditRequest(**(good | fields)))  # type: ignore[arg-type]  # as above
    assert caught.value.metadata == {"param": param}


@pytest.mark.parametrize(
    "request_",
    [
        SetPriceRequest(model_id="m", input_nano_usd_per_mtok=10**12 + 1),
        SetPriceRequest(model_id="m", output_nano_usd_per_mtok=-1),
        SetPriceRequest(),
    ],
)
def test_wrong_prices_are_refused(request_: SetPriceRequest) -> None:
    with pytest.raises(InvalidArgument):
        limits.check_price(request_)


def test_many_settled_jobs_are_one_message() -> None:
    jobs = [(bytes([at]) * 16, at * 1000, 65537 + at, at * 800) for at in range(3)]
    told = each_settled(Settled.FromString(wire.many_to_wire(jobs)))
    assert [(id_, one.charge.amount_nano_usd, one.pays[0].fence, one.pays[0].pay_nano_usd) for id_, one in told] == jobs
