"""API keys at a caller: their form is checked here, whom they belong to by the router. Only the id and a hash travel on."""

import hashlib
from typing import Final, NamedTuple

from gpumesh_runtime.errors import Reason, Unauthenticated
from gpumesh_runtime.ids import crc32_text

PREFIX: Final = "gm_live_"
_MAX_KEY_CHARS: Final = 200
# Keys whose checksum was right, by their hash: the checksum in Python costs 4 us, this 0.1.
_REMEMBERED: Final = 10_000
_remembered: dict[bytes, str] = {}


class ApiKey(NamedTuple):
    """What the router needs of an API key. sha256: of the whole key, 32 bytes (sensitive: never logged)."""

    key_id: str
    sha256: bytes


def read_api_key(text: str) -> ApiKey:
    """`gm_live_<id>_<secret>_<crc32>` as an ApiKey.

    Raises Unauthenticated (INVALID_API_KEY) for one that cannot be ours: a typing error, a key of another service.
    """
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    key_id = _remembered.get(sha256)
    if key_id is None:
        key_id = _check(text)
        if len(_remembered) >= _REMEMBERED:
            _remembered.clear()
        _remembered[sha256] = key_id
    return ApiKey(key_id, sha256)


def _check(text: str) -> str:
    if text.startswith(PREFIX) and len(text) <= _MAX_KEY_CHARS and text.isascii():
        body, _, checksum = text.rpartition("_")
        key_id, _, secret = body.removeprefix(PREFIX).rpartition("_")
        if key_id and secret and crc32_text(body) == checksum:
            return key_id
    text = "The API key is not valid. Check that it was copied whole; keys begin with 'gm_live_'."
    raise Unauthenticated(Reason.INVALID_API_KEY, text)
