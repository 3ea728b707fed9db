"""The admission desk: who, what, may it pay, where."""

import hashlib
from collections.abc import Iterable

import pytest

from gpumesh_router.domain.admission import Ask, Desk, Fetch, Grant, Missing
from gpumesh_router.domain.capacity import GONE_S, RECENT_S, ModelCapacity
from gpumesh_router.domain.catalogue import Model, Price
from gpumesh_router.domain.identities import MAX_CACHE_S, REFUSAL_CACHE_S
from gpumesh_runtime.error_types import MeshError, NotFound, Unauthenticated, Unavailable
from gpumesh_runtime.reasons import Reason

DIGEST = hashlib.sha256(b"key").digest()
NOW = 1000.0
PRICE = Price(1, 1_000_000, 2_000_000)
MODEL = Model("tiny", "r1", 1024, 0, ("small",), frozenset({1}), frozenset({1, 2}))


def ask(
    *,
    job_id: bytes = b"j" * 16,
    model: str = "tiny",
    max_output: int | None = 100,
    features: Iterable[int] = (),
    **other: object,
) -> Ask:
    """A request that is admitted unless the test spoils it."""
    fields: dict[str, object] = {
        "key_id": "k1",
        "key_sha256": DIGEST,
        "modality": 1,
        "input_tokens": 50,
        "choices": 1,
        "attempt": 1,
        "deadline_s": 60.0,
        **other,
    }
    return Ask(job_id=job_id, model=model, features=frozenset(features), max_output_tokens=max_output, **fields)  # type: ignore[arg-type]  # kwargs of mixed types


def ready_desk(*, balance: int = 10_000_000, nodes: int = 1) -> Desk:
    """A desk that knows everything a good request needs."""
    desk = Desk()
    desk.catalogue.replace_models([MODEL])
    desk.catalogue.update_prices({"tiny": PRICE}, whole=True)
    desk.identities.remember("k1", DIGEST, "acct_a", 900, NOW)
    desk.balances.up()
    desk.balances.update("acct_a", balance, 1)
    desk.capacity.up("s0", "boot1", "127.0.0.1:1", NOW)
    give(desk, "s0", nodes=nodes)
    return desk


def give(desk: Desk, scheduler_id: str, *, nodes: int = 1, outstanding: int = 0, now: float = NOW) -> None:
    """One scheduler's word on the model."""
    capacity = ModelCapacity("tiny", nodes, 4 * nodes, 4 * nodes, 0, outstanding)
    desk.capacity.update(scheduler_id, [capacity], whole=True, draining=False, now=now)


def granted(desk: Desk, request: Ask, now: float = NOW) -> Grant:
    """The grant, or the test fails."""
    outcome = desk.decide(request, now)
    assert isinstance(outcome, Grant)
    return outcome


def refused(desk: Desk, request: Ask, now: float = NOW) -> MeshError:
    """The refusal, or the test fails."""
    with pytest.raises(MeshError) as caught:
        desk.decide(request, now)
    return caught.value


def test_a_good_request_gets_model_price_hold_and_scheduler() -> None:
    grant = granted(ready_desk(), ask())
    assert (grant.account_id, grant.model.model_id, grant.scheduler.boot_id) == ("acct_a", "tiny", "boot1")
    assert grant.max_output_tokens == 100
    assert grant.hold_nano_usd == 50 * 1 + 100 * 2


def test_an_alias_finds_the_model_and_a_wrong_name_gets_near_ones() -> None:
    desk = ready_desk()
    assert granted(desk, ask(model="small")).model.model_id == "tiny"
    error = refused(desk, ask(model="tinny"))
    assert isinstance(error, NotFound)
    assert error.reason is Reason.UNKNOWN_MODEL
    assert "tiny" in error.metadata["near"]
    assert error.metadata["param"] == "model"


def test_an_unknown_key_is_fetched_first_and_a_stranger_learns_nothing_before() -> None:
    desk = ready_desk()
    outcome = desk.decide(ask(key_id="other", model="no-such-model"), NOW)
    assert outcome == Fetch(Missing.KEY)


def test_a_wrong_secret_for_a_known_key_is_refused_at_once() -> None:
    error = refused(ready_desk(), ask(key_sha256=b"x" * 32))
    assert isinstance(error, Unauthenticated)
    assert error.reason is Reason.INVALID_API_KEY


def test_a_refused_key_is_asked_for_again_after_five_seconds() -> None:
    desk = ready_desk()
    desk.identities.refuse(b"y" * 32, Unauthenticated(Reason.INVALID_API_KEY), NOW)
    stranger = ask(key_id="k9", key_sha256=b"y" * 32)
    assert refused(desk, stranger).reason is Reason.INVALID_API_KEY
    assert desk.decide(stranger, NOW + REFUSAL_CACHE_S) == Fetch(Missing.KEY)


def test_a_revoked_key_is_refused_even_while_cached() -> None:
    desk = ready_desk()
    desk.identities.revoke(["k1"])
    assert refused(desk, ask()).reason is Reason.REVOKED_API_KEY


def test_a_suspended_account_is_refused_until_restored() -> None:
    desk = ready_desk()
    desk.identities.suspend(["acct_a"])
    assert refused(desk, ask()).reason is Reason.ACCOUNT_SUSPENDED
    desk.identities.restore(["acct_a"])
    granted(desk, ask())


def test_a_cached_key_is_asked_for_again_after_fifteen_minutes_at_most() -> None:
    desk = ready_desk()
    desk.identities.remember("k1", DIGEST, "acct_a", 1e9, NOW)
    assert desk.decide(ask(), NOW + MAX_CACHE_S + 1) == Fetch(Missing.KEY)


def test_an_unknown_balance_is_fetched() -> None:
    desk = ready_desk()
    desk.identities.remember("k2", DIGEST, "acct_b", 900, NOW)
    assert desk.decide(ask(key_id="k2"), NOW) == Fetch(Missing.BALANCE, "acct_b")


@pytest.mark.parametrize("balance", [0, -5])
def test_an_empty_balance_is_refused(balance: int) -> None:
    error = refused(ready_desk(balance=balance), ask())
    assert error.reason is Reason.INSUFFICIENT_BALANCE


def test_holds_of_running_jobs_count_and_a_release_frees_all_but_the_charge() -> None:
    desk = ready_desk(balance=300)
    granted(desk, ask(job_id=b"1" * 16))
    granted(desk, ask(job_id=b"2" * 16))
    assert refused(desk, ask(job_id=b"3" * 16)).reason is Reason.INSUFFICIENT_BALANCE
    desk.balances.release(b"1" * 16, 10)
    desk.balances.release(b"1" * 16, 10)
    granted(desk, ask(job_id=b"3" * 16))
    assert desk.balances.holds == 2


def test_a_second_attempt_replaces_the_first_ones_hold() -> None:
    desk = ready_desk(balance=300)
    for attempt in (1, 2, 3, 4):
        granted(desk, ask(attempt=attempt))
    assert desk.balances.holds == 1


def test_a_hold_that_nobody_releases_ends_after_deadline_and_grace() -> None:
    desk = ready_desk()
    granted(desk, ask())
    assert desk.balances.expire(NOW + 119) == 0
    assert desk.balances.expire(NOW + 121) == 1
    assert desk.balances.holds == 0


def test_balances_are_spent_from_for_a_minute_after_metering_is_gone() -> None:
    desk = ready_desk()
    desk.balances.down(NOW)
    granted(desk, ask(), NOW + 1)
    give(desk, "s0", now=NOW + 61)
    assert desk.decide(ask(), NOW + 61) == Fetch(Missing.BALANCE, "acct_a")


def test_balances_are_asked_for_again_when_metering_is_back() -> None:
    desk = ready_desk()
    granted(desk, ask())
    desk.balances.down(NOW)
    desk.balances.up()
    assert desk.decide(ask(job_id=b"2" * 16), NOW) == Fetch(Missing.BALANCE, "acct_a")
    desk.balances.update("acct_a", 500, 7)
    granted(desk, ask(job_id=b"2" * 16))


def test_an_older_balance_changes_nothing() -> None:
    desk = ready_desk(balance=0)
    desk.balances.update("acct_a", 1_000, 0)
    assert refused(desk, ask()).reason is Reason.INSUFFICIENT_BALANCE


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        ({"modality": 3}, Reason.FEATURE_UNSUPPORTED),
        ({"features": {4}}, Reason.FEATURE_UNSUPPORTED),
        ({"choices": 0}, Reason.INVALID_ARGUMENT),
        ({"choices": 129}, Reason.INVALID_ARGUMENT),
        ({"input_tokens": 1024}, Reason.CONTEXT_LENGTH_EXCEEDED),
    ],
)
def test_what_the_model_cannot_do_is_refused(spoiled: dict[str, object], reason: Reason) -> None:
    assert refused(ready_desk(), ask(**spoiled)).reason is reason  # type: ignore[arg-type]  # kwargs of mixed types


def test_a_prompt_that_does_not_fit_is_told_both_numbers() -> None:
    error = refused(ready_desk(), ask(input_tokens=2000))
    assert (error.metadata["limit"], error.metadata["used"]) == ("1024", "2000")
    assert "1024" in error.message
    assert "2000" in error.message


def test_choices_multiply_the_output_cap() -> None:
    assert granted(ready_desk(), ask(choices=3)).max_output_tokens == 300
    assert granted(ready_desk(), ask(max_output=None)).max_output_tokens == 1024
    assert granted(ready_desk(), ask(max_output=5000)).max_output_tokens == 1024


def test_no_scheduler_and_no_node_are_told_apart() -> None:
    desk = ready_desk(nodes=0)
    error = refused(desk, ask())
    assert (error.reason, error.retryable) == (Reason.NO_CAPACITY, False)
    desk.capacity.down("s0")
    error = refused(desk, ask())
    assert isinstance(error, Unavailable)
    assert (error.reason, error.retryable) == (Reason.SCHEDULER_UNAVAILABLE, True)


def test_a_model_whose_node_just_left_is_still_queued_for() -> None:
    desk = ready_desk()
    give(desk, "s0", nodes=0, now=NOW + 1)
    granted(desk, ask(), NOW + 1)
    give(desk, "s0", nodes=0, now=NOW + RECENT_S + 1)
    assert refused(desk, ask(), NOW + RECENT_S + 1).reason is Reason.NO_CAPACITY


def test_a_restarted_scheduler_still_remembers_which_models_it_served() -> None:
    desk = ready_desk()
    desk.capacity.down("s0")
    desk.capacity.up("s0", "boot2", "127.0.0.1:1", NOW + 2)
    assert granted(desk, ask(), NOW + 2).scheduler.boot_id == "boot2"


def test_a_silent_scheduler_is_not_chosen() -> None:
    desk = ready_desk()
    assert refused(desk, ask(), NOW + GONE_S).reason is Reason.SCHEDULER_UNAVAILABLE


def test_the_less_loaded_scheduler_is_chosen_and_excluded_ones_only_as_a_last_resort() -> None:
    desk = ready_desk()
    give(desk, "s0", outstanding=10_000)
    desk.capacity.up("s1", "b", "127.0.0.1:2", NOW)
    give(desk, "s1")
    assert granted(desk, ask()).scheduler.scheduler_id == "s1"
    assert granted(desk, ask(excluded=("s1",))).scheduler.scheduler_id == "s0"
    assert granted(desk, ask(excluded=("s0", "s1"))).scheduler.scheduler_id == "s1"


def test_what_no_connected_node_can_do_is_refused_at_once_and_not_granted() -> None:
    desk = ready_desk()
    assert refused(desk, ask(features={1})).reason is Reason.NO_CAPACITY
    able = ModelCapacity("tiny", 1, 4, 4, 0, 0, frozenset({1}))
    desk.capacity.update("s0", [able], whole=True, draining=False, now=NOW)
    grant = granted(desk, ask(features={1}))
    standing = desk.stand(grant, b"g" * 16, NOW)
    assert standing is not None
    assert standing.features == {1}
    assert refused(desk, ask(features={2})).reason is Reason.NO_CAPACITY


def test_jobs_sent_since_the_last_word_count_as_load() -> None:
    desk = ready_desk()
    desk.capacity.up("s1", "b", "127.0.0.1:2", NOW)
    give(desk, "s1")
    chosen = [granted(desk, ask(job_id=bytes([n]) * 16)).scheduler.scheduler_id for n in range(10)]
    assert chosen.count("s0") == chosen.count("s1") == 5


def test_a_hold_is_rounded_up() -> None:
    assert Price(1, 1, 1).hold_nano_usd(1, 1) == 1
    assert Price(1, 0, 0).hold_nano_usd(10**9, 10**9) == 0


def test_a_grant_reserves_an_eighth_of_what_is_left_and_is_released_in_steps() -> None:
    desk = ready_desk(balance=80_000)
    grant = granted(desk, ask())
    standing = desk.stand(grant, b"g" * 16, NOW)
    assert standing is not None
    assert standing.budget_nano_usd == (80_000 - 250) // 8
    left = desk.balances.spare("acct_a")
    desk.balances.release(b"g" * 16, 1_000, 3_000)
    assert desk.balances.spare("acct_a") == left + standing.budget_nano_usd - 1_000 - 3_000
    desk.balances.release(b"g" * 16, 2_500, 0)
    assert desk.balances.spare("acct_a") == left + standing.budget_nano_usd - 1_000 - 2_500


def test_however_many_grants_are_asked_for_half_of_the_account_stays_free() -> None:
    desk = ready_desk(balance=8_000_000)
    given = [desk.stand(granted(desk, ask(job_id=bytes([n]) * 16)), bytes([n]) * 15 + b"g", NOW) for n in range(200)]
    assert 3 <= sum(standing is not None for standing in given) <= 8
    assert desk.balances.spare("acct_a") > 8_000_000 * 0.35
    granted(desk, ask(job_id=b"z" * 16))


def test_an_account_near_its_end_gets_no_grant() -> None:
    desk = ready_desk(balance=250 * 32 * 8)
    assert desk.stand(granted(desk, ask()), b"g" * 16, NOW) is None
