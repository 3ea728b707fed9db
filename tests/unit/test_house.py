"""The house rules that a test can check."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = [
    "services/router",
    "services/registry",
    "services/metering",
    "services/scheduler",
    "services/edge-http",
    "node",
]
HEADINGS = ["Owns", "RPCs", "State", "Depends on", "How it fails"]


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks."""
    done = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_the_three_lists_of_source_roots_agree() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    assert build["dev-mode-dirs"] == wheel["only-include"] == wheel["sources"]
    assert all((ROOT / root).is_dir() for root in build["dev-mode-dirs"])


@pytest.mark.parametrize(
    "lock",
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("requirements/**/*.lock"), ROOT / "protos/requirements.txt"]
    ),
)
def test_a_lock_file_pins_hashes_and_names_no_index_host_or_path(lock: str) -> None:
    text = (ROOT / lock).read_text()
    pins = [line for line in text.splitlines() if re.match(r"^[A-Za-z0-9]", line)]
    assert pins
    assert all("==" in line for line in pins)
    assert text.count("--hash=sha256:") >= len(pins)
    assert not re.search(r"https?://|file:|find-links|index-url|trusted-host|(^|\s)/\w", text)


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_readme_has_the_same_headings(service: str) -> None:
    found = re.findall(r"^## (.+)$", (ROOT / service / "README.md").read_text(), re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS


def test_every_tests_folder_is_a_package() -> None:
    folders = {path.parent for path in tracked("tests/*.py", "tests/**/*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_no_file_grows_beyond_its_room() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in tracked("*.py", "*.sh")
        if "protos/gen" not in path.as_posix() and (lines := len(path.read_text().splitlines())) > 450
    }
    assert not long


def test_nothing_large_is_committed() -> None:
    assert not [path.name for path in tracked() if path.stat().st_size > 4_000_000]


def test_decision_records_are_numbered_without_gaps() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
