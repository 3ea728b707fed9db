#!/usr/bin/env bash
# Makes gpumesh-tiny again, judges it over HTTP, and puts it where the launcher ships it from. About half an hour of
# one core. It works in an environment of its own (.cache/model-venv): PyTorch is no dependency of gpumesh.
# Environment: TOKENS (training tokens), SEED, PYTHON (default python3), KEEP=1 to leave the shipped files as they are.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
shipped=$root/deploy/local/src/gpumesh_local/model
venv=$root/.cache/model-venv
out=$root/.cache/model-out

if [ ! -e "$venv/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  # Alone and unhashed: the wheel depends on the platform. On Linux without a GPU, PyTorch's CPU index saves 2 GB.
  "$venv/bin/pip" install --quiet "torch==2.13.0"
  "$venv/bin/pip" install --quiet --require-hashes -r "$here/requirements.txt"
  touch "$venv/.ready"
fi

cd "$here"
export OMP_NUM_THREADS=1
nice -n 10 "$venv/bin/python" -m gpumesh_tiny --out "$out" ${TOKENS:+--tokens "$TOKENS"} ${SEED:+--seed "$SEED"}
"$venv/bin/python" -m gpumesh_tiny.evaluate --model "$out/gpumesh-tiny.gguf" --results "$out/results.json"
"$venv/bin/python" -m gpumesh_tiny.card --folder "$out"
if [ -z "${KEEP:-}" ]; then
  cp "$out/gpumesh-tiny.gguf" "$out/tokenizer.json" "$out/MODEL_CARD.md" "$shipped/"
fi
