"""Runs the GGUF under llama.cpp's own HTTP server and talks to it, as a node does."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import xllamacpp

from .template import NAME

TIMEOUT_S = 60.0


class Client:
    """A small JSON client of one server; every call opens its own connection."""

    def __init__(self, address: str) -> None:
        self._netloc = urlsplit(address).netloc

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of `path`. Raises RuntimeError with the body when the status is not 200."""
        connection = http.client.HTTPConnection(self._netloc, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{path} answered {response.status}: {text}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """One chat completion, greedy and at most 400 tokens unless the options say otherwise."""
        body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 400, **options}
        return self.post("/v1/chat/completions", body)

    def stream(self, messages: list[dict[str, Any]], **options: Any) -> list[str]:
        """The contents of a streamed chat completion, one entry per chunk that carries text."""
        body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 400, "stream": True, **options}
        connection = http.client.HTTPConnection(self._netloc, timeout=TIMEOUT_S)
        pieces: list[str] = []
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    pieces += [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]
        finally:
            connection.close()
        return pieces


@contextmanager
def serving(model: Path, *, slots: int = 2, context: int = 2048) -> Iterator[Client]:
    """llama.cpp's server in this process on a free loopback port, with `context` tokens for each slot."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.model_alias = {NAME}
    parameters.port = 0
    parameters.n_parallel = slots
    parameters.n_ctx = slots * context
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.n_threads_http = slots + 2
    parameters.use_jinja = True
    parameters.ui = False
    parameters.warmup = False
    parameters.fit_params = False
    parameters.cache_ram_mib = 0
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    try:
        yield Client(server.listening_address)
    finally:
        # Dropping the last reference stops its threads and closes the port.
        del server
