"""`python -m gpumesh_node.signing_request KEYFILE`: makes the key if it is absent, writes a signing request (PKCS#10, DER) to stdout.

A process of its own, because cryptography costs 15 MB for as long as a process lives, and a node needs it for a moment once in 12 hours.
"""

import base64
import sys
from pathlib import Path

from gpumesh_node.hardening import forbid_core_dumps
from gpumesh_runtime.ca import csr_for_key, make_key_and_csr
from gpumesh_runtime.files import write_private


def main() -> None:
    """Entry point."""
    forbid_core_dumps()
    key = Path(sys.argv[1])
    if not key.exists():
        write_private(key, make_key_and_csr("")[0])
    # Without a name: the registry decides what the certificate is for.
    pem = csr_for_key(key.read_bytes(), "")
    sys.stdout.buffer.write(base64.b64decode(b"".join(pem.split(b"-----")[2].split())))


if __name__ == "__main__":
    main()
