#!/usr/bin/env bash
# Trains with N processes on this machine, as a pod does with one process per host:
#
#   launch/local.sh 2 --config configs/digits.py --workdir runs/digits
#
# The arguments after N go to `emu-jax train`. When one process fails, the others are stopped and its
# status is returned. --dry-run prints the commands. All scripts of this directory need bash 4.3 or
# later. Environment:
#   EMU_JAX  the command (default: .venv/bin/emu-jax of this checkout)
#   PORT     port of the coordinator (default: a free one)
#   DEVICES  CPU devices per process (default: 1)
#   GRACE    seconds that a process gets to save and end (default: 60)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

usage='launch/local.sh [--dry-run] N [--] TRAIN_ARGUMENT...'
if [[ ${1:-} == --dry-run ]]; then
  option[dry-run]=yes
  shift
fi
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage
processes=$1
shift
[[ ${1:-} != -- ]] || shift
[[ $# -gt 0 ]] || usage

emu_jax=${EMU_JAX:-$root/.venv/bin/emu-jax}
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

# Each process has its own group, so that Ctrl-C reaches it once, through `stop`.
set -m
pids=()

# Asks the processes to save and end, and kills those that do not: a process that waits for a dead
# peer never ends by itself.
stop() {
  trap - EXIT INT TERM
  kill "${pids[@]}" 2>/dev/null || return 0
  for ((second = 0; second < ${GRACE:-60}; second++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
}
trap stop EXIT
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM

for ((i = 0; i < processes; i++)); do
  command=(env "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes"
    "JAX_PROCESS_ID=$i" "JAX_NUM_CPU_DEVICES=${DEVICES:-1}" "$emu_jax" train "$@")
  if [[ ${option[dry-run]:-} ]]; then
    echo "$(quote "${command[@]}") &"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
if [[ ${option[dry-run]:-} ]]; then
  trap - EXIT
  echo wait
  exit
fi
for ((i = 0; i < processes; i++)); do
  wait -n || exit $?
done
