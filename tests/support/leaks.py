"""Looks for text that must be nowhere: in files and bytes, in every encoding in which it might have been written."""

import base64
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, quote_plus

from google.protobuf.text_encoding import CEscape

_LETTERS = "ЖЯЫЮÉßñ€漢字🙂"


def ascii_marker() -> str:
    """A word that occurs nowhere else and looks the same in most encodings."""
    return f"leak{secrets.token_hex(8)}"


def hard_marker() -> str:
    """A word of quotes, backslashes, slashes and letters beyond ASCII, which JSON, URLs and logs write differently."""
    return "".join(secrets.choice(_LETTERS) for _ in range(10)) + '"\\/%&' + secrets.choice(_LETTERS) * 2


def base64_forms(raw: bytes) -> list[bytes]:
    """The characters of Base64 that depend on `raw` alone, for each place that it can have within a group of three bytes."""
    found = []
    for before in range(3):
        text = base64.b64encode(bytes(before) + raw)
        found.append(text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6])
    return found


def forms(marker: str) -> dict[str, bytes]:
    """Ways in which a text may be written down, by name."""
    raw = marker.encode()
    found = {
        "plain": raw,
        "utf-16": marker.encode("utf-16-le"),
        "json": json.dumps(marker)[1:-1].encode(),
        "json, utf-8": json.dumps(marker, ensure_ascii=False)[1:-1].encode(),
        "json in json": json.dumps(json.dumps(marker)[1:-1])[1:-1].encode(),
        "python": repr(marker)[1:-1].encode(),
        "python bytes": repr(raw)[2:-1].encode(),
        "url": quote(marker, safe="").encode(),
        "url path": quote(marker).encode(),
        "form": quote_plus(marker).encode(),
        "hex": raw.hex().encode(),
        "protobuf text": str(CEscape(raw, as_utf8=False)).encode(),
    }
    for number, text in enumerate(base64_forms(raw)):
        found[f"base64 at {number}"] = text
        found[f"url-safe base64 at {number}"] = text.replace(b"+", b"-").replace(b"/", b"_")
    return found


class Search:
    """Looks for markers. Each hit is said once, as "place: form"."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._needles: dict[bytes, str] = {}
        for marker in markers:
            for name, needle in forms(marker).items():
                self._needles.setdefault(needle, name)

    def data(self, place: str, data: bytes) -> list[str]:
        """Hits in bytes."""
        return [f"{place}: {name}" for needle, name in self._needles.items() if needle in data]

    def folder(self, folder: Path) -> list[str]:
        """Hits in names and contents of all files below a folder. Files that go away meanwhile are not at rest."""
        hits: list[str] = []
        for path in sorted(folder.rglob("*")):
            hits += self.data("a file's name", str(path).encode())
            try:
                if path.is_file() and not path.is_symlink():
                    hits += self.data(str(path.relative_to(folder)), path.read_bytes())
            except FileNotFoundError:
                continue
        return hits
