"""Channel and server options. The two ends' keepalive figures belong together, which is why they stand in one file.

Unknown option names are ignored silently by gRPC; `tests/integration/runtime` checks that these work.
"""

from collections.abc import Sequence
from typing import Final

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
MAX_METADATA_BYTES: Final = 8 * 1024

# A client pings an idle connection this often, also without a call in progress: NATs and load balancers forget
# silent ones.
_CLIENT_PING_MS: Final = 20_000
# A server must allow pings at least that often, or it answers GOAWAY too_many_pings during a long silent prefill.
_SERVER_ALLOWS_PING_MS: Final = 5_000
_PING_TIMEOUT_MS: Final = 10_000
# A server pings too, so that a client which vanished without FIN is noticed in 40 s.
_SERVER_PING_MS: Final = 30_000

Options = list[tuple[str, str | int]]


def server_options() -> Options:
    """Options of every server of ours."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", _SERVER_PING_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _SERVER_ALLOWS_PING_MS),
        ("grpc.http2.max_pings_without_data", 0),
        # Two processes that share a port by mistake would each get half the connections: better the second one fails
        # to start.
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 10_000),
    ]


def client_options(max_backoff_ms: int = 1_000) -> Options:
    """Options of every channel of ours. max_backoff_ms: gRPC's own grows to 120 s, far too slow between services of
    one mesh.
    """
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", _CLIENT_PING_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # In spite of its name: how long one attempt to connect, TLS handshake included, may take. It slows no retry down.
        # 100 here once cut every handshake that took longer, over a long way or on a busy machine.
        ("grpc.min_reconnect_backoff_ms", 10_000),
        ("grpc.max_reconnect_backoff_ms", max_backoff_ms),
        # Retries are ours (client.unary): gRPC's transparent ones hide how often a service fails.
        ("grpc.enable_retries", 0),
        # A new channel is a new connection: with a renewed certificate, and not shared with another part of the
        # process.
        ("grpc.use_local_subchannel_pool", 1),
        # http_proxy in the environment is for the outside world, never for services of the mesh.
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
    ]


def merged(ours: Options, given: Sequence[tuple[str, str | int]]) -> Options:
    """Our options with `given` in place of those of the same name, so that gRPC never sees two."""
    return list({**dict(ours), **dict(given)}.items())
