#!/usr/bin/env bash
# Regenerates protos/gen byte for byte with the pinned generator, in an environment of its own so that it never drags the run-time protobuf down.
# Usage: protos/generate.sh [OUT]   (OUT: another folder, to compare; default protos/gen/python)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-protos/gen/python}
venv=.venv-protos
if [ ! -x "$venv/bin/protoc-gen-mypy" ] || ! cmp -s protos/requirements.txt "$venv/requirements.txt"; then
  echo "protos: installing the generator into $venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --require-hashes -r protos/requirements.txt
  cp protos/requirements.txt "$venv/requirements.txt"
fi
rm -rf "$out/gpumesh"
mkdir -p "$out"
# Sorted, so that the order of the command line never changes the output.
mapfile -t files < <(cd protos && find gpumesh -name '*.proto' | LC_ALL=C sort)
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -Iprotos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet,only_async:"$out" "${files[@]}"
find "$out/gpumesh" -type d -exec sh -c 'for d; do : > "$d/__init__.py"; done' _ {} +
: > "$out/gpumesh/py.typed"
echo "protos: ${#files[@]} files -> $out"
