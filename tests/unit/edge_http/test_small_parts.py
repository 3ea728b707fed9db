"""Keys, throttle, problems and settings of the edge."""

import json

import pytest

from gpumesh_edge_http.auth import key_from_header
from gpumesh_edge_http.config import EdgeSettings
from gpumesh_edge_http.problems import STATUS_TEXT, UNAUTHENTICATED, body_of, headers_of, problem_of
from gpumesh_edge_http.throttle import FailureThrottle
from gpumesh_registry.domain.keys import digest, make
from gpumesh_runtime.config import ConfigError
from gpumesh_runtime.errors import MeshError, Reason, ResourceExhausted, Unauthenticated

KEY = make("k1", bytes(32))


def test_a_key_of_the_registry_is_read() -> None:
    for header in (f"Bearer {KEY}", f"bearer  {KEY} "):
        assert key_from_header(header) == ("k1", digest(KEY))


def test_a_key_id_may_hold_underscores() -> None:
    assert key_from_header(f"Bearer {make('key_a_b', bytes(32))}").key_id == "key_a_b"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, Reason.MISSING_API_KEY),
        ("", Reason.MISSING_API_KEY),
        ("Bearer", Reason.MISSING_API_KEY),
        (f"Basic {KEY}", Reason.MISSING_API_KEY),
        ("Bearer sk-abc", Reason.INVALID_API_KEY),
        (f"Bearer {KEY[:-1]}", Reason.INVALID_API_KEY),
        (f"Bearer {KEY}x", Reason.INVALID_API_KEY),
        (f"Bearer {KEY.replace('k1', 'k2')}", Reason.INVALID_API_KEY),
        ("Bearer gm_live_é", Reason.INVALID_API_KEY),
        ("Bearer gm_live_" + "x" * 5000, Reason.INVALID_API_KEY),
    ],
)
def test_what_cannot_be_a_key_is_refused_here(header: str | None, reason: Reason) -> None:
    with pytest.raises(Unauthenticated) as caught:
        key_from_header(header)
    assert caught.value.reason is reason
    if header and "_live_" in header:
        assert header.removeprefix("Bearer ") not in caught.value.message


def test_an_address_may_fail_in_a_burst_and_then_at_a_rate() -> None:
    throttle = FailureThrottle(burst=3, per_s=0.5)
    for _ in range(3):
        assert throttle.blocked_s("a", 0.0) == 0
        throttle.failed("a", 0.0)
    assert throttle.blocked_s("a", 0.0) == 2
    assert throttle.blocked_s("b", 0.0) == 0
    assert throttle.blocked_s("a", 2.0) == 0


def test_the_throttle_remembers_a_bounded_number_of_addresses() -> None:
    throttle = FailureThrottle(burst=1, per_s=1, max_addresses=10)
    for number in range(100):
        throttle.failed(f"a{number}", 0.0)
    assert [number for number in range(100) if throttle.blocked_s(f"a{number}", 0.0)] == list(range(90, 100))


def test_a_key_that_was_admitted_is_good_until_it_is_refused() -> None:
    throttle = FailureThrottle(burst=1, per_s=1)
    throttle.admitted(b"k")
    assert throttle.is_good(b"k")
    throttle.refused(b"k")
    assert not throttle.is_good(b"k")


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_status_and_a_body(reason: Reason) -> None:
    error = MeshError.of(reason, "Because.")
    assert problem_of(reason).status in STATUS_TEXT
    shown = json.loads(body_of(error))["error"]
    assert set(shown) == {"message", "type", "param", "code"}
    assert shown["message"]
    assert shown["code"]


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.MISSING_API_KEY, 401),
        (Reason.REVOKED_API_KEY, 401),
        (Reason.INSUFFICIENT_BALANCE, 402),
        (Reason.UNKNOWN_MODEL, 404),
        (Reason.METHOD_NOT_ALLOWED, 405),
        (Reason.REQUEST_TIMEOUT, 408),
        (Reason.PAYLOAD_TOO_LARGE, 413),
        (Reason.UNSUPPORTED_MEDIA_TYPE, 415),
        (Reason.QUEUE_FULL, 429),
        (Reason.RATE_LIMITED, 429),
        (Reason.NO_CAPACITY, 503),
        (Reason.DRAINING, 503),
        (Reason.DEADLINE_EXCEEDED, 504),
    ],
)
def test_reasons_have_the_status_that_clients_expect(reason: Reason, status: int) -> None:
    assert problem_of(reason).status == status


def test_the_unauthenticated_reasons_are_those_with_401() -> None:
    assert Reason.INVALID_API_KEY in UNAUTHENTICATED
    assert Reason.ACCOUNT_SUSPENDED not in UNAUTHENTICATED


def test_a_wait_is_said_in_whole_seconds() -> None:
    assert b"Retry-After: 3\r\n" in headers_of(ResourceExhausted(Reason.QUEUE_FULL, "x", retry_after_s=2.1))
    assert b"Retry-After: 1\r\n" in headers_of(MeshError.of(Reason.NO_CAPACITY, "x"))
    assert b"WWW-Authenticate" in headers_of(MeshError.of(Reason.INVALID_API_KEY, "x"))


def test_what_is_ours_to_mend_says_no_more_than_that() -> None:
    shown = json.loads(body_of(MeshError.of(Reason.STALE_FENCE, "fence 7 of node n-1")))["error"]
    assert "n-1" not in shown["message"]


def test_plain_http_stays_on_loopback() -> None:
    assert EdgeSettings.read(host="::1").http_tls() is None
    for host in ("0.0.0.0", "10.1.2.3", "example.org"):
        with pytest.raises(ConfigError):
            EdgeSettings.read(host=host)
