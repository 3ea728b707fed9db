"""Shapes of ids, names and pages."""

import pytest

from gpumesh_registry.domain import checks
from gpumesh_runtime.errors import InvalidArgument


@pytest.mark.parametrize("value", ["acct_a", "acct_" + "x" * 40, "acct_a_1"])
def test_account_ids_of_the_right_shape_pass(value: str) -> None:
    assert checks.account_id(value) == value


@pytest.mark.parametrize("value", ["", "acct_", "acct_A", "acct_" + "x" * 41, "prov_a", "acct_a\n", "acct_a b"])
def test_other_account_ids_are_refused_and_the_field_is_named(value: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        checks.account_id(value)
    assert caught.value.metadata == {"param": "account_id"}


@pytest.mark.parametrize("value", ["prov", "prov_", "acct_a", "prov_Ä"])
def test_other_provider_ids_are_refused(value: str) -> None:
    with pytest.raises(InvalidArgument):
        checks.provider_id(value)


@pytest.mark.parametrize("value", ["", "a" * 33, "a_b", "a-b", "é"])
def test_other_key_ids_are_refused(value: str) -> None:
    with pytest.raises(InvalidArgument):
        checks.key_id(value)


@pytest.mark.parametrize("value", ["", "   ", "x" * 101, "two\nlines"])
def test_names_are_one_line_of_1_to_100_characters(value: str) -> None:
    with pytest.raises(InvalidArgument):
        checks.name(value)


def test_a_key_may_have_no_name() -> None:
    assert checks.name("", required=False) == ""


def test_pages_have_100_rows_unless_asked_and_1000_at_most() -> None:
    assert checks.page_size(0) == 100
    assert checks.page_size(1000) == 1000
    with pytest.raises(InvalidArgument):
        checks.page_size(1001)


def test_a_page_token_leads_back_to_its_position() -> None:
    assert checks.page_position(checks.page_token(42)) == 42
    assert checks.page_position("") is None


@pytest.mark.parametrize("token", ["42", "42.abc", "x.y", "-1.000000", "9" * 30 + ".000000", "٤.000000"])
def test_a_page_token_that_is_not_ours_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument):
        checks.page_position(token)
