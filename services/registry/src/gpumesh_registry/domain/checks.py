"""Shapes of ids and names. Each check returns the value or raises InvalidArgument that names the field in metadata "param"."""

import re
from typing import Final

from gpumesh_runtime.error_types import InvalidArgument
from gpumesh_runtime.ids import crc32_text
from gpumesh_runtime.reasons import Reason

_OWNER_TAIL: Final = r"[a-z0-9_]{1,40}"
_ACCOUNT: Final = re.compile(rf"acct_{_OWNER_TAIL}")
_PROVIDER: Final = re.compile(rf"prov_{_OWNER_TAIL}")
_KEY: Final = re.compile(r"[A-Za-z0-9]{1,32}")
_NODE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MODEL_ID: Final = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
SHA256_HEX: Final = re.compile(r"[0-9a-f]{64}")
MAX_NAME: Final = 100
MAX_PAGE: Final = 1000
_DEFAULT_PAGE: Final = 100


def invalid(param: str, message: str) -> InvalidArgument:
    """The error for a field that must be mended."""
    return InvalidArgument(Reason.INVALID_ARGUMENT, message, metadata={"param": param})


def account_id(value: str) -> str:
    """ "acct_" and 1-40 of [a-z0-9_]."""
    if not _ACCOUNT.fullmatch(value):
        raise invalid("account_id", 'account_id must be "acct_" and 1-40 of a-z, 0-9 and _.')
    return value


def provider_id(value: str) -> str:
    """ "prov_" and 1-40 of [a-z0-9_]."""
    if not _PROVIDER.fullmatch(value):
        raise invalid("provider_id", 'provider_id must be "prov_" and 1-40 of a-z, 0-9 and _.')
    return value


def key_id(value: str) -> str:
    """1-32 of [a-zA-Z0-9]."""
    if not _KEY.fullmatch(value):
        raise invalid("key_id", "key_id must be 1-32 of a-z, A-Z and 0-9.")
    return value


def is_key_id(value: str) -> bool:
    """Whether a key of that id can exist at all. A stranger's text goes no further when not: PostgreSQL refuses some of it,
    which would fail the query for everybody who shares it.
    """
    return _KEY.fullmatch(value) is not None


def model_id(value: str) -> str:
    """1-128 of [A-Za-z0-9._:/-]."""
    if not MODEL_ID.fullmatch(value):
        raise invalid("model_id", "model_id must be 1-128 of A-Z, a-z, 0-9 and . _ : / -")
    return value


def tokenizer_sha256(value: str) -> str:
    """64 lower-case hex digits."""
    if not SHA256_HEX.fullmatch(value):
        raise invalid("tokenizer_sha256", "tokenizer_sha256 must be 64 lower-case hex digits.")
    return value


def node_id(value: str) -> str:
    """What can stand in a certificate's identity."""
    if not _NODE.fullmatch(value):
        raise invalid("node_id", "node_id is not one of ours.")
    return value


def name(value: str, *, required: bool = True) -> str:
    """A name for people: 1-100 (or 0-100) printable characters, no line breaks."""
    if len(value) > MAX_NAME or (required and not value.strip()) or (value and not value.isprintable()):
        raise invalid("name", f"name must be {1 if required else 0}-{MAX_NAME} printable characters.")
    return value


def page_size(value: int) -> int:
    """Rows of a page: 1-1000, 0 means 100."""
    if value > MAX_PAGE:
        raise invalid("page_size", f"page_size must be at most {MAX_PAGE}.")
    return value or _DEFAULT_PAGE


def page_token(position: int) -> str:
    """The token of the page that follows `position`. Its checksum catches tokens that are not ours."""
    return f"{position}.{crc32_text(f'page {position}')}"


def page_position(token: str) -> int | None:
    """Where the page begins; None: at the start. Raises InvalidArgument."""
    if not token:
        return None
    digits = token.partition(".")[0]
    # 18 digits: every such number fits the database's bigint.
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18) or token != page_token(int(digits)):
        raise invalid("page_token", "page_token is not one of ours.")
    return int(digits)
