"""Who may become a node, and who may stay one."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from gpumesh_registry.domain import enrolment
from gpumesh_registry.domain.enrolment import OldCertificate, TokenRecord
from gpumesh_registry.domain.owners import Node
from gpumesh_runtime.errors import InvalidArgument, MeshError, Reason

NOW = datetime(2026, 6, 1, tzinfo=UTC)
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
NODE = Node("node_1", "prov_p", KEY, NOW)
UNUSED = TokenRecord("prov_p", NOW + timedelta(minutes=10))
USED = replace(UNUSED, node=NODE)
OLD = OldCertificate("prov_p", "node_1", NOW, KEY)


def refusal_of_token(token: TokenRecord | None, key: bytes = KEY, now: datetime = NOW) -> Reason:
    with pytest.raises(MeshError) as caught:
        enrolment.use_token(token, key, now)
    return caught.value.reason


def refusal_of_renewal(node: Node | None, key: bytes = KEY, now: datetime = NOW, old: OldCertificate = OLD) -> Reason:
    with pytest.raises(MeshError) as caught:
        enrolment.may_renew(old, node, key, now)
    return caught.value.reason


def test_an_unused_token_makes_a_node() -> None:
    assert enrolment.use_token(UNUSED, KEY, NOW) is None


def test_the_same_token_with_the_same_key_gives_the_same_node_even_after_the_tokens_end() -> None:
    assert enrolment.use_token(USED, KEY, NOW + timedelta(days=1)) is NODE


def test_a_used_token_with_another_key_is_refused() -> None:
    assert refusal_of_token(USED, OTHER_KEY) is Reason.ENROLMENT_TOKEN_INVALID


def test_unknown_and_expired_tokens_look_the_same() -> None:
    assert refusal_of_token(None) is Reason.ENROLMENT_TOKEN_INVALID
    assert refusal_of_token(UNUSED, now=UNUSED.expire_time) is Reason.ENROLMENT_TOKEN_INVALID


def test_a_revoked_node_cannot_enrol_again_with_its_token() -> None:
    assert refusal_of_token(replace(USED, node=replace(NODE, revoke_time=NOW))) is Reason.NODE_REVOKED


def test_a_certificate_renews_with_its_key_until_30_days_after_its_end() -> None:
    enrolment.may_renew(OLD, NODE, KEY, NOW - timedelta(hours=1))
    enrolment.may_renew(OLD, NODE, KEY, NOW + timedelta(days=30))
    assert refusal_of_renewal(NODE, now=NOW + timedelta(days=30, seconds=1)) is Reason.CERTIFICATE_INVALID


def test_a_certificate_does_not_renew_with_another_key_or_for_another_owner_or_an_unknown_node() -> None:
    assert refusal_of_renewal(NODE, OTHER_KEY) is Reason.CERTIFICATE_INVALID
    assert refusal_of_renewal(replace(NODE, provider_id="prov_q")) is Reason.CERTIFICATE_INVALID
    assert refusal_of_renewal(None) is Reason.CERTIFICATE_INVALID


def test_a_revoked_node_does_not_renew() -> None:
    assert refusal_of_renewal(replace(NODE, revoke_time=NOW)) is Reason.NODE_REVOKED


def test_a_tokens_checksum_is_checked_before_anyone_is_asked() -> None:
    token = enrolment.make_token(b"s" * 32)
    assert len(enrolment.token_digest(token)) == 32
    for wrong in ("", token[:-1], token[:-1] + ("A" if token[-1] != "A" else "B"), "gm_live_x", token * 3):
        with pytest.raises(MeshError) as caught:
            enrolment.token_digest(wrong)
        assert caught.value.reason is Reason.ENROLMENT_TOKEN_INVALID


def test_a_token_works_for_ten_minutes_unless_asked_and_a_day_at_most() -> None:
    assert enrolment.lifetime(0) == timedelta(minutes=10)
    assert enrolment.lifetime(86_400) == timedelta(days=1)
    for seconds in (59, 86_401):
        with pytest.raises(InvalidArgument):
            enrolment.lifetime(seconds)
