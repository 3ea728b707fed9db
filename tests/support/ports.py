"""Free ports on loopback."""

import socket


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_port_block(size: int) -> int:
    """The first of `size` ports in a row, none of which anything listens on; below the range from which the kernel takes client ports."""
    for first in range(20_000, 31_000, size):
        try:
            for port in range(first, first + size):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports on loopback")
