#!/usr/bin/env bash
# Trains on the TPU slices of a GKE cluster that xpk made, which queues the runs of a team:
#
#   launch/xpk.sh run --name emu --cluster pods --zone us-east5-a --topology v5p:4x4x8 \
#     --image "$IMAGE" --storage emu -- \
#     --config configs/emu_14b.py --workdir /bucket/emu_14b
#
#   run    queues training    tail  follows the first host's log    stop  lets it save and end
# The same options may stand with every verb; --dry-run prints what would be run. For a cluster
# without xpk, which these may share, see launch/gke.sh.
#
# --storage is the name that `xpk storage attach` gave to a bucket; it is mounted where that said.
# docs/launch.md has the command.
#
# Environment:
#   GRACE     seconds that training has to save and end when it is stopped (default: 300)
#   RESTARTS  restarts, after failures and preemptions, until it gives up (default: 50)
#   EXTRA_FLAGS  for the compiler, after those of launch/flags.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$root/lib.sh"
# shellcheck source=launch/flags.sh
source "$root/flags.sh"

usage="launch/xpk.sh [--dry-run] run|tail|stop --name NAME --cluster C --zone ZONE
         --topology GENERATION:SHAPE [--slices N] --image IMAGE [--storage NAME]
         [--project P] [--priority P] -- TRAIN_ARGUMENT..."
options='name cluster zone topology slices image storage project priority'
switches='dry-run'
parse "$@"
need name cluster zone
at=("--workload=${option[name]}" "--cluster=${option[cluster]}" "--zone=${option[zone]}")
[[ -z ${option[project]:-} ]] || at+=("--project=${option[project]}")

case $verb in
  run)
    need topology image
    need_train
    read_topology
    hosts=$((chips / 4))
    case $generation in
      v4 | v5p) tpu=$generation-$((2 * chips)) ;;
      v5e) tpu=v5litepod-$chips ;;
      v6e) tpu=v6e-$chips ;;
      tpu7x) tpu=tpu7x-$shape ;;
    esac
    storage=()
    [[ -z ${option[storage]:-} ]] || storage=("--storage=${option[storage]}")
    # 1: a crash. What a signal ends, 128 and up, xpk restarts without being told. `exec`, so that
    # the SIGTERM which xpk passes on reaches training.
    run xpk workload create "${at[@]}" "--tpu-type=$tpu" "--num-slices=$slices" \
      "--docker-image=${option[image]}" "--priority=${option[priority]:-medium}" \
      "${storage[@]}" \
      "--max-restarts=${RESTARTS:-50}" --restart-on-exit-codes=1 \
      "--termination-grace-period-seconds=${GRACE:-300}" \
      "--env=JAX_NUM_PROCESSES=$((hosts * slices))" \
      "--env=$(flags_variable "$generation" "$slices")" \
      "--command=exec $(quote emu-jax train "${train[@]}")" ;;
  tail)
    run kubectl logs --follow --max-log-requests=1 "--selector=$(
      )jobset.sigs.k8s.io/jobset-name=${option[name]},jobset.sigs.k8s.io/job-index=0,$(
      )batch.kubernetes.io/job-completion-index=0" ;;
  stop) run xpk workload delete "${at[@]}" --force ;;
  *) usage ;;
esac
