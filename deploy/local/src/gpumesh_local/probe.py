"""Asks the mesh for a real completion over HTTP, as its first client."""

import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Final

_EVERY_S: Final = 0.1
_REQUEST_TIMEOUT_S: Final = 20.0
# The mesh is on this machine: a proxy of the environment is for the outside world.
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def complete(base_url: str, api_key: str, model: str) -> str:
    """One short chat completion. Gives its text; raises OSError (HTTPError, URLError) or ValueError."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
    request = urllib.request.Request(  # noqa: S310 -- always our own http://127.0.0.1
        f"{base_url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
    )
    with _OPENER.open(request, timeout=_REQUEST_TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
    return str(answer["choices"][0]["message"]["content"])


def until_answered(base_url: str, api_key: str, model: str, within_s: float, give_up: threading.Event) -> str:
    """Tries until there is an answer; empty then, else why there was none within the time or until give_up was set."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            complete(base_url, api_key, model)
        except urllib.error.HTTPError as err:
            problem = f"HTTP {err.code}: {_message(err)}"
        except (OSError, ValueError, KeyError, IndexError) as err:
            problem = f"{type(err).__name__}: {err}"
        else:
            return ""
        if time.monotonic() >= deadline or give_up.wait(_EVERY_S):
            return problem


def _message(err: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(err)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(err.reason)
