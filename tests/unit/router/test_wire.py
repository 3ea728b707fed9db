"""Wire to nouns and back."""

import pytest

from gpumesh.common.v1 import job_pb2
from gpumesh.common.v1.job_pb2 import Feature, Modality
from gpumesh.router.v1.admission_service_pb2 import AdmitRequest
from gpumesh_router.domain.catalogue import Price
from gpumesh_router.wire import ask_from_wire, model_from_wire, price_from_wire, price_to_wire


@pytest.mark.parametrize("price", [Price(1, 2, 3), Price(1, 2, 3, 0), Price(9, 10**12, 10**12, 5)])
def test_a_price_survives_the_round_trip(price: Price) -> None:
    assert price_from_wire(price_to_wire(price)) == price


def test_an_absent_output_cap_differs_from_zero() -> None:
    assert ask_from_wire(AdmitRequest()).max_output_tokens is None
    assert ask_from_wire(AdmitRequest(max_output_tokens=0)).max_output_tokens == 0


def test_defaults_of_an_empty_request_are_one_choice_first_attempt_and_a_deadline() -> None:
    ask = ask_from_wire(AdmitRequest(input_tokens_estimate=-5))
    assert (ask.choices, ask.attempt, ask.deadline_s, ask.input_tokens) == (1, 1, 600.0, 0)


def test_a_model_keeps_what_admission_needs() -> None:
    model = model_from_wire(
        job_pb2.Model(
            model_id="m",
            revision="r",
            context_tokens=9,
            max_output_tokens=3,
            aliases=["x"],
            modalities=[Modality.MODALITY_CHAT],
            features=[Feature.FEATURE_STRUCTURED, Feature.FEATURE_LOGPROBS],
        )
    )
    assert (model.model_id, model.aliases) == ("m", ("x",))
    assert (model.modalities, model.features) == (frozenset({1}), frozenset({2, 3}))
