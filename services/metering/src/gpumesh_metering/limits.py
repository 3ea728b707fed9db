"""What operators may ask for. Each check raises InvalidArgument with metadata "param" for the field that is wrong."""

from typing import Final, NoReturn

from gpumesh.metering.v1 import ledger_service_pb2 as ledger
from gpumesh_metering import wire
from gpumesh_metering.domain.pricing import MAX_PRICE
from gpumesh_runtime.errors import InvalidArgument, Reason

MAX_CREDIT: Final = 10**15  # nano-USD: $1,000,000
MAX_OWNER_CHARACTERS: Final = 200
MAX_CREDIT_ID_CHARACTERS: Final = 64
MAX_MEMO_CHARACTERS: Final = 200
MAX_MODEL_CHARACTERS: Final = 128
MAX_PAGE: Final = 1_000


def _wrong(param: str, message: str) -> NoReturn:
    raise InvalidArgument(Reason.INVALID_ARGUMENT, message, metadata={"param": param})


def _text(param: str, value: str, least: int, most: int) -> None:
    # PostgreSQL's text holds no zero character.
    if not least <= len(value) <= most or "\x00" in value:
        _wrong(param, f"{param} must have {least} to {most} characters.")


def check_owner(owner_id: str) -> None:
    """An account's or provider's id."""
    _text("owner_id", owner_id, 1, MAX_OWNER_CHARACTERS)


def check_credit(request: ledger.CreditRequest) -> None:
    """A credit."""
    _text("account_id", request.account_id, 1, MAX_OWNER_CHARACTERS)
    _text("credit_id", request.credit_id, 1, MAX_CREDIT_ID_CHARACTERS)
    _text("memo", request.memo, 0, MAX_MEMO_CHARACTERS)
    if not 1 <= request.amount_nano_usd <= MAX_CREDIT:
        _wrong("amount_nano_usd", f"amount_nano_usd must be 1 to {MAX_CREDIT}.")


def check_price(request: ledger.SetPriceRequest) -> None:
    """A price."""
    _text("model_id", request.model_id, 1, MAX_MODEL_CHARACTERS)
    for param in ("input_nano_usd_per_mtok", "output_nano_usd_per_mtok"):
        if not 0 <= getattr(request, param) <= MAX_PRICE:
            _wrong(param, f"{param} must be 0 to {MAX_PRICE}.")


def check_usage(request: ledger.ListUsageRequest) -> int | None:
    """A page of usage; the number below which it starts, None for the first."""
    _text("account_id", request.account_id, 0, MAX_OWNER_CHARACTERS)
    if request.page_size > MAX_PAGE:
        _wrong("page_size", f"page_size must be 1 to {MAX_PAGE}.")
    if request.job_id and len(request.job_id) != wire.JOB_ID_BYTES:
        _wrong("job_id", f"job_id must have {wire.JOB_ID_BYTES} bytes.")
    try:
        return wire.page_from_wire(request.page_token)
    except wire.WireError:
        _wrong("page_token", "page_token is not one of ours.")
