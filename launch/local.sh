#!/usr/bin/env bash
# Trains with N processes on this machine, as a pod does with one a host:
#
#   launch/local.sh 2 --config configs/digits.py --workdir runs/digits
#
# What follows N goes to `emu-jax train`. When one process fails, the others are stopped and
# its status is returned. Needs bash 4.3 or later. Environment:
#   EMU_JAX  the command (default: .venv/bin/emu-jax of this checkout)
#   PORT     of the coordinator (default: one that is free)
#   DEVICES  CPU devices for each process (default: 1)
#   GRACE    seconds that a process has to save and end (default: 60)
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N --config FILE --workdir DIR [--config.a.b=VALUE ...]" >&2
  exit 2
fi
processes=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
emu_jax=${EMU_JAX:-$root/.venv/bin/emu-jax}
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

# Each process in its own group, so that Ctrl-C reaches it once, through `stop`.
set -m
pids=()

# Asks the processes to save and end, and ends those that do not: one that waits for a peer
# that is gone never would.
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
  JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i \
    JAX_NUM_CPU_DEVICES=${DEVICES:-1} "$emu_jax" train "$@" &
  pids+=($!)
done
for ((i = 0; i < processes; i++)); do
  wait -n || exit $?
done
