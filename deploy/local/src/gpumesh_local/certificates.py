"""The CA of this machine, a certificate per process (made anew at each start), and the ticket key ring."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from gpumesh_local.home import Home
from gpumesh_runtime import sealing
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.identity import operator_uri, service_uri

# The registry renews a certificate until 30 days after its end; a day to spare.
_RENEWABLE_FOR: Final = timedelta(days=29)


def make(home: Home, schedulers: int) -> None:
    """Everything that processes need to trust each other. The CA and the key ring are kept, the rest is renewed."""
    ca = FileCa.load_or_create(home.tls)
    for service in ("registry", "metering", "router", "edge"):
        ca.issue_files(service, service_uri(service))
    for number in range(schedulers):
        ca.issue_files(f"scheduler-{number}", service_uri("scheduler", f"scheduler-{number}"))
    ca.issue_files("operator", operator_uri("local"), dns=(), ip=())
    sealing.create_file(home.secrets / "tickets.json")


def node_is_enrolled(home: Home, folder: Path) -> bool:
    """Whether a node's folder holds an identity of this mesh that works or can be renewed. One that does not is removed,
    so that the node enrols anew; its journal stays.
    """
    certificate = folder / "node.crt"
    try:
        ours = (folder / "ca.crt").read_bytes() == (home.tls / "ca.crt").read_bytes()
        end = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        ours, end = False, datetime.min.replace(tzinfo=UTC)
    if ours and datetime.now(UTC) < end + _RENEWABLE_FOR:
        return True
    forget_node(folder)
    return False


def forget_node(folder: Path) -> None:
    """Removes a node's key and certificate."""
    for name in ("node.key", "node.crt"):
        (folder / name).unlink(missing_ok=True)
