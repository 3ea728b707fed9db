"""The chassis of every process: configuration, logs, traces, metrics, errors, RPC, links, lifecycle, database. It
contains no domain noun.
"""

import os

# gRPC's C core writes its own lines to stderr, past our log format and allow list. It reads this when it is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Its fork handlers cost a lock per call and we never fork after the start: engines are started by exec.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
