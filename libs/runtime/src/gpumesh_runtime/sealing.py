"""Seals: HMAC-SHA256 with a ring of keys that several processes share in one file.

The file is JSON: {"keys": [{"id": "k1", "secret_b64": "...", "not_before": 1767225600}, ...]}, not_before in Unix
seconds.
The newest key whose not_before has passed seals; every key verifies, so a ring can be rotated without a restart:
add a key with a not_before in the near future, let every process read the file, remove the oldest later.
2.6 us a seal; an Ed25519 signature costs 85 us, half of a request's whole budget.
"""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gpumesh_runtime.files import write_private

_SECRET_BYTES: Final = 32
_BLOCK_BYTES: Final = 64
_IPAD: Final = bytes(value ^ 0x36 for value in range(256))
_OPAD: Final = bytes(value ^ 0x5C for value in range(256))
_MOST_DERIVED: Final = 4096
_LOOK_EVERY_S: Final = 1.0  # how often the file's stamp is compared; a stat costs about 1 us, a seal 2.6


class Mac:
    """HMAC-SHA256 with one key, its pads hashed once: 0.6 us a message against 1.4 for hmac.digest."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, secret: bytes) -> None:
        block = (hashlib.sha256(secret).digest() if len(secret) > _BLOCK_BYTES else secret).ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(block.translate(_IPAD))
        self._outer = hashlib.sha256(block.translate(_OPAD))

    def __call__(self, message: bytes) -> bytes:
        """The 32-byte MAC."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()


@dataclass(frozen=True, slots=True)
class _Key:
    id: str
    secret: bytes = field(repr=False)
    not_before: float = 0.0
    mac: Mac = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mac", Mac(self.secret))


class KeyRingError(Exception):
    """The key ring file is missing or malformed. The text names the file and the problem, never a secret."""


class KeyRing:
    """Seals and verifies with the keys in `path`, which is read again when it changes. Raises KeyRingError."""

    def __init__(
        self,
        path: str | Path,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self._wall = wall
        self._monotonic = monotonic
        self._stamp: tuple[int, int, int] = (0, 0, 0)
        self._keys: dict[str, _Key] = {}
        self._sealing: _Key | None = None
        self._next_look = 0.0
        self._derived: dict[tuple[str, tuple[bytes, bytes]], Mac] = {}
        self._load(required=True)

    def seal(self, context: bytes, body: bytes) -> tuple[str, bytes]:
        """(key id, 32-byte MAC) over context + body. The context says what kind of thing is sealed, so that no seal
        fits another kind.
        """
        key = self._current()
        return key.id, key.mac(context + body)

    def verify(self, context: bytes, key_id: str, body: bytes, mac: bytes) -> bool:
        """Whether a key of the ring sealed exactly this. Never raises for what a stranger sent."""
        if self._monotonic() >= self._next_look:
            self._load()
        key = self._keys.get(key_id)
        return key is not None and hmac.compare_digest(key.mac(context + body), mac)

    def grant(self, context: bytes, body: bytes) -> tuple[str, bytes]:
        """(key id, secret of 32 bytes) derived for `body`: whoever has it can seal under `body` and under nothing else."""
        key = self._current()
        return key.id, key.mac(context + body)

    def check(self, grant: tuple[bytes, bytes] | None, context: bytes, key_id: str, body: bytes, mac: bytes) -> bool:
        """Whether this was sealed by a key of the ring, or, with (context, body) of a grant, by the secret that grant() gave for it.

        Never raises for what a stranger sent.
        """
        if grant is None:
            return self.verify(context, key_id, body, mac)
        if self._monotonic() >= self._next_look:
            self._load()
        derived = self._derived.get((key_id, grant)) or self._derive(key_id, grant)
        return derived is not None and hmac.compare_digest(derived(context + body), mac)

    def _derive(self, key_id: str, grant: tuple[bytes, bytes]) -> "Mac | None":
        key = self._keys.get(key_id)
        if key is None:
            return None
        if len(self._derived) >= _MOST_DERIVED:
            self._derived.clear()
        mac = self._derived[key_id, grant] = Mac(key.mac(grant[0] + grant[1]))
        return mac

    def _current(self) -> _Key:
        if self._sealing is None or self._monotonic() >= self._next_look:
            self._load()
        if self._sealing is None:
            raise KeyRingError(f"{self.path}: no key is valid yet")
        return self._sealing

    def _load(self, *, required: bool = False) -> None:
        """Reads the file if it changed and picks the sealing key. A file that cannot be read later on leaves the
        keys as they were.
        """
        self._next_look = self._monotonic() + _LOOK_EVERY_S
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp != self._stamp:
                self._keys = _parse(self.path)
                self._stamp = stamp
                self._derived.clear()
        except (OSError, KeyRingError) as err:
            if required:
                raise KeyRingError(f"{self.path}: {err}") from err
        now = self._wall()
        valid = [key for key in self._keys.values() if key.not_before <= now]
        self._sealing = max(valid, key=lambda key: (key.not_before, key.id), default=None)


def _parse(path: Path) -> dict[str, _Key]:
    try:
        entries = json.loads(path.read_text())["keys"]
        keys = {
            str(entry["id"]): _Key(
                str(entry["id"]), base64.b64decode(entry["secret_b64"], validate=True), float(entry["not_before"])
            )
            for entry in entries
        }
    except (KeyError, TypeError, ValueError, binascii.Error) as err:
        raise KeyRingError(
            f'expected {{"keys": [{{"id", "secret_b64", "not_before"}}]}} ({type(err).__name__})'
        ) from None
    if not keys or any(len(key.secret) < _SECRET_BYTES for key in keys.values()):
        raise KeyRingError(f"needs at least one key, each of {_SECRET_BYTES} bytes or more")
    return keys


def _entry(not_before: float) -> dict[str, str | float]:
    return {
        "id": f"k{secrets.token_hex(4)}",
        "secret_b64": base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode(),
        "not_before": not_before,
    }


def create_file(path: str | Path) -> None:
    """Makes a ring with one key, valid at once, readable by its owner only. Does nothing when the file exists."""
    target = Path(path)
    if not target.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(target, json.dumps({"keys": [_entry(0)]}, indent=1).encode())


def rotate_file(path: str | Path, *, activate_in_s: float = 60.0, keep: int = 3) -> None:
    """Adds a key that will seal from `activate_in_s` seconds on (time for every process to read it) and keeps the
    `keep` newest.
    """
    target = Path(path)
    entries = json.loads(target.read_text())["keys"]
    entries.append(_entry(time.time() + activate_in_s))
    entries.sort(key=lambda entry: entry["not_before"])
    write_private(target, json.dumps({"keys": entries[-keep:]}, indent=1).encode())
