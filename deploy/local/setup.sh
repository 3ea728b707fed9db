#!/usr/bin/env bash
# Installs hash-pinned packages, and the project unless `bare`, into a virtual environment. Usage: setup.sh VENV LOCK [bare]
# LOCK: all, dev, clients/openai3, ...: a file in requirements/ without ".lock".
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$1 what=$2
say() { printf '\033[1msetup:\033[0m %s\n' "$*"; }

usable() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python=${PYTHON:-}
if [ -z "$python" ]; then
  # The distribution's interpreter first: it is built with profile-guided optimisation, and our processes run 1.2 times faster on it
  # than on a plain build. It counts only where a virtual environment can be made with it (Debian ships that part on its own).
  if [ -x /usr/bin/python3 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && usable /usr/bin/python3 \
    && ! /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null; then
    say "installing Debian's python3-venv"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv; } >/dev/null 2>&1 || true
  fi
  for candidate in /usr/bin/python3 python3.11 python3.12 python3.13 python3; do
    if usable "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "no Python >= 3.11 found: installing Debian's"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 python3-venv >/dev/null
    python=python3
  else
    say "Python 3.11 or later with venv is needed: install it (Debian: apt install python3 python3-venv) and run this again"; exit 1
  fi
fi
if [ ! -x "$venv/bin/python" ]; then
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
say "installing requirements/$what.lock ($(grep -c '==' "requirements/$what.lock") packages, a minute or two the first time)"
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --progress-bar off --require-hashes -r "requirements/$what.lock" 2> >(grep -v '^WARNING' >&2)
[ "${3:-}" != bare ] || exit 0
say "installing gpumesh itself"
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e . 2> >(grep -v '^WARNING' >&2)
touch "$venv/.installed-$what"
if [ "$what" = dev ]; then touch "$venv/.installed-all"; fi  # dev holds everything that all does
say "done"
