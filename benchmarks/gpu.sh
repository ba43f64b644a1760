#!/usr/bin/env bash
# Checks and measures one GPU in at most 9 minutes, without network:
#
#   benchmarks/gpu.sh runs/gpu            # jax with CUDA, torch, transformers and diffusers
#   benchmarks/gpu.sh --smoke runs/gpu    # every part at a toy size, on any machine
#
# OUT/performance.md and OUT/performance.json are those of docs/ with the figures of this GPU, written
# after each part: a run that is cut off keeps what it has. To publish them, copy both to docs/.
# $SECONDS_LIMIT is the limit, $PYTHON is the interpreter (default: python).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
smoke=0
if [[ ${1:-} == --smoke ]]; then smoke=1; shift; fi
if [[ $# -gt 1 || ${1:-} == -* ]]; then
  echo "usage: benchmarks/gpu.sh [--smoke] [OUT]" >&2
  exit 2
fi
out=${1:-runs/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd)
for file in performance.md performance.json; do
  [[ -e $out/$file ]] || cp "$root/docs/$file" "$out/$file"
done
limit=520  # leaves 20 s to start and to write
if [[ $smoke == 0 ]]; then
  # shellcheck source=/dev/null
  source <("$root/launch/flags.sh" gpu)
else
  # Compiling is most of the work here, and how long it takes says nothing.
  limit=3600
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"
  export JAX_COMPILATION_CACHE_DIR="$out/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
fi
# The process that starts the parts must leave them the memory, and each shares it with torch.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m emu_jax.cli bench gpu --set gpu.smoke="$smoke" \
  --set gpu.seconds="${SECONDS_LIMIT:-$limit}" --write "$out/performance.md"
