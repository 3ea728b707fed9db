"""The child process of the built-in engine: llama.cpp's own HTTP server, by xllamacpp, on a loopback port that it chooses.

Started as `python -m gpumesh_node.engines.llamacpp_child`. One JSON line of ChildSettings comes on stdin, one of ChildReady goes to
stdout; then it serves until stdin ends, which it does when the node dies, however it dies. The API key comes on stdin because arguments
are visible to all users of the machine.
"""

import os
import signal
import sys
from typing import Final

import msgspec

from gpumesh_node.hardening import die_with_parent, forbid_core_dumps

# Each open connection holds one of llama.cpp's HTTP threads, also while its client reads slowly; a job of n choices opens n.
# Idle threads cost address space only.
_THREADS_PER_SLOT: Final = 16  # MAX_SPLIT of openai_http; this process does not import it, for its memory's sake
_SPARE_THREADS: Final = 4


class ChildSettings(msgspec.Struct, frozen=True):
    """What the child is told. context_tokens: per slot, 0 shares the model's own context among the slots. parent: pid of the node."""

    path: str
    alias: str
    slots: int
    context_tokens: int
    threads: int
    api_key: str
    parent: int
    gpu_layers: int = 0

    def __repr__(self) -> str:
        return f"ChildSettings(path={self.path!r}, alias={self.alias!r})"


class ChildReady(msgspec.Struct, frozen=True):
    """What the child answers: where it listens, or why it does not."""

    address: str = ""
    error: str = ""


def serve(settings: ChildSettings) -> object:
    """Loads the model and listens; returns the server, which lives as long as it is referred to, with `listening_address`."""
    # Imported here: the child says what is wrong in words when the wheel is missing or does not fit the machine.
    import xllamacpp  # noqa: PLC0415 -- see above

    params = xllamacpp.CommonParams()
    params.model.path = settings.path
    params.model_alias = {settings.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings.api_key]
    params.n_parallel = settings.slots
    params.n_ctx = settings.slots * settings.context_tokens
    params.cpuparams.n_threads = settings.threads
    params.cpuparams_batch.n_threads = settings.threads
    params.n_threads_http = settings.slots * _THREADS_PER_SLOT + _SPARE_THREADS
    params.n_gpu_layers = settings.gpu_layers
    params.use_jinja = True
    params.ui = False
    params.warmup = False
    params.fit_params = False
    # Prompts must not be kept beyond their job, nor logged.
    params.cache_ram_mib = 0
    params.verbosity = 0
    return xllamacpp.Server(params)


def main() -> None:
    """Entry point."""
    forbid_core_dumps()
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=ChildSettings)
    die_with_parent(settings.parent)
    # Ctrl-C goes to the whole group of processes; this one serves until the node, which drains, closes stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Whatever C++ prints goes nowhere near the line that the node reads.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        server = serve(settings)
        ready = ChildReady(address=str(server.listening_address))  # type: ignore[attr-defined]  # xllamacpp has no types
    except Exception as err:  # whatever it is, the node shall read why and try again
        server, ready = None, ChildReady(error=f"{type(err).__name__}: {str(err)[:300]}")
    answer.write(msgspec.json.encode(ready) + b"\n")
    answer.flush()
    if server is not None:
        sys.stdin.buffer.read()
    # Not a return: llama.cpp's threads may hold the interpreter's own end up.
    os._exit(0 if server is not None else 1)


if __name__ == "__main__":
    main()
