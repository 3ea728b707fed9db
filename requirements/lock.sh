#!/usr/bin/env bash
# Renews every lock file. They are pinned and hashed and name no index, host or path (tests/unit/test_house.py checks).
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-uv}
compile() { "$uv" pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --python-version 3.11 "$@"; }
compile pyproject.toml requirements/build.in --extra all -o requirements/all.lock
compile pyproject.toml requirements/build.in --extra dev -c requirements/all.lock -o requirements/dev.lock
compile protos/requirements.in -o protos/requirements.txt
for client in requirements/clients/*.in; do compile "$client" -o "${client%.in}.lock"; done
