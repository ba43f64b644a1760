#!/usr/bin/env bash
# Installs a distribution as a user does, and runs it outside of a clone:
#
#   tools/check_install.sh dist/emu_jax-*.whl [PYTHON]
#
# In a fresh environment, from an empty folder: a dry run with a config that comes along, and the
# demo until the first rows of metrics of its first stage. PYTHON is the interpreter (python3).
set -euo pipefail

distribution=$(realpath "$1")
constraints=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${2:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "$distribution" -c "$constraints"
mkdir "$folder/empty"
cd "$folder/empty"
PATH="$folder/env/bin:$PATH"
unset PYTHONPATH

python -c 'import emu_jax, sys; sys.exit(not emu_jax.__file__.startswith(sys.prefix))'
emu-jax train --config configs/digits_clip.py --workdir run --dry-run

emu-jax demo --workdir demo &
demo=$!
rows=demo/parents/digits_clip/metrics.jsonl
until [ -s "$rows" ]; do
  kill -0 "$demo"
  sleep 1
done
kill -TERM "$demo"
status=0
wait "$demo" || status=$?
[ "$status" = 130 ] # it saved, and was interrupted
head -n 1 "$rows"
[ "$(ls)" = demo ] # the dry run wrote nothing
echo "$(basename "$distribution"): ok"
