"""The Authorization header."""

from gpumesh_dispatch.api_key import ApiKey, read_api_key
from gpumesh_runtime.errors import Reason, Unauthenticated


def key_from_header(authorization: str | None) -> ApiKey:
    """`Authorization: Bearer gm_live_...` as an ApiKey. Raises Unauthenticated: MISSING_API_KEY or INVALID_API_KEY."""
    if not authorization:
        text = "No API key was given. Send the header 'Authorization: Bearer gm_live_...'."
        raise Unauthenticated(Reason.MISSING_API_KEY, text)
    scheme, _, text = authorization.partition(" ")
    text = text.strip()
    if scheme.lower() != "bearer" or not text:
        raise Unauthenticated(
            Reason.MISSING_API_KEY, "The Authorization header holds no bearer token. Send 'Bearer gm_live_...'."
        )
    return read_api_key(text)
