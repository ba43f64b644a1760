#!/usr/bin/env bash
# Trains on the TPU slices of a GKE cluster that xpk created and whose queue a team shares:
#
#   launch/xpk.sh run --name emu --cluster pods --zone us-east5-a --topology v5p:4x4x8 \
#     --image "$IMAGE" -- --config configs/emu_14b.py --workdir gs://my-bucket/emu_14b
#
#   run    queues training    tail  follows the first host's log    stop  saves, then ends training
# All verbs accept the same options; --dry-run prints the commands. For a cluster without xpk, use
# launch/gke.sh.
#
# Runs and data in gs:// need no mount. --storage is the name that `xpk storage attach` gave to a bucket,
# which is mounted as that command said (docs/launch.md).
#
# Environment:
#   GRACE     seconds that training gets to save and end (default: 300)
#   RESTARTS  restarts, after failures and preemptions, before it gives up (default: 50)
#   EXTRA_FLAGS  compiler flags, appended to those of launch/flags.sh
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
    # 1 is a crash. xpk always restarts processes that a signal ended (128 and up). `exec` lets
    # the SIGTERM that xpk forwards reach training.
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
