#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster, one process per GPU, in a container (pyxis) or from a
# virtual environment that every node sees:
#
#   launch/slurm.sh run --name emu --nodes 16 --image my-registry#emu/gpu --mount /data:/data -- \
#     --config configs/emu_14b.py --workdir /data/runs/emu_14b
#   launch/slurm.sh run --name emu --nodes 16 --venv /data/emu_jax/.venv -- ...
#
#   run   queues training    tail  follows its log    stop  saves, then ends training
# All verbs accept the same options; --dry-run prints the commands. Before its time limit or a
# preemption the job saves and requeues itself, with the same number and the same log, until training
# has ended. Environment:
#   GRACE     seconds that training gets to save and end (default: 300)
#   RESTARTS  restarts of the job after which a failure ends it (default: 10)
#   EXTRA_FLAGS  compiler flags, appended to those of launch/flags.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$root/lib.sh"
# shellcheck source=launch/flags.sh
source "$root/flags.sh"

usage="launch/slurm.sh [--dry-run] run|tail|stop --name NAME --nodes N [--gpus N_PER_NODE]
         (--image IMAGE [--mount FROM:TO[,FROM:TO...]] | --venv DIR) [--partition P]
         [--account A] [--time D-HH:MM:SS] [--log FILE] -- TRAIN_ARGUMENT..."
options='name nodes gpus image mount venv partition account time log'
switches='dry-run'
parse "$@"
need name
log=${option[log]:-${option[name]}.log}

# Prints the batch script. JAX reads the process numbers from SLURM and needs only their count. Every
# task sees all GPUs of its node, and JAX assigns it the one with its local number.
batch() {
  local variable step=(srun --kill-on-bad-exit=1)
  variable=$(flags_variable gpu)
  if [[ ${option[image]:-} ]]; then
    step+=("--container-image=${option[image]}" --no-container-mount-home --container-workdir=/emu)
    [[ -z ${option[mount]:-} ]] || step+=("--container-mounts=${option[mount]}")
    step+=(emu-jax)
  else
    step+=("${option[venv]}/bin/emu-jax")
  fi
  cat <<END
#!/usr/bin/env bash
export JAX_NUM_PROCESSES=\$SLURM_NTASKS
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
export $(quote "$variable")

# \`launch/slurm.sh stop\` sends USR1: training saves and ends, and so does the job.
stopped=
trap 'stopped=yes; kill -TERM \$step' USR1
$(quote "${step[@]}" train "${train[@]}") &
step=\$!
wait \$step; status=\$?
[[ ! \$stopped ]] || { wait \$step; status=\$?; }
echo "training ended with status \$status (start \$((\${SLURM_RESTART_COUNT:-0} + 1)))" >&2

# 0: done. 2: an error that a restart does not fix. 130: it saved before its time limit.
case \$stopped:\$status in
  yes:* | :0 | :2) exit \$status ;;
  :130) scontrol requeue "\$SLURM_JOB_ID" ;;
  *)
    [[ \${SLURM_RESTART_COUNT:-0} -lt ${RESTARTS:-10} ]] || exit \$status
    scontrol requeue "\$SLURM_JOB_ID" ;;
esac
END
}

case $verb in
  run)
    need nodes
    [[ -n ${option[image]:-} || -n ${option[venv]:-} ]] || usage "run needs --image or --venv"
    [[ -z ${option[image]:-} || -z ${option[venv]:-} ]] || usage "give --image or --venv, not both"
    need_train
    nodes=$(number nodes 1)
    gpus=$(number gpus 8)
    more=()
    for name in partition account time; do
      [[ -z ${option[$name]:-} ]] || more+=("--$name=${option[$name]}")
    done
    script=$(batch)
    feed "$script" sbatch "--job-name=${option[name]}" "--nodes=$nodes" \
      "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" --exclusive "${more[@]}" \
      "--output=$log" --open-mode=append --requeue "--signal=TERM@${GRACE:-300}" ;;
  tail) run tail --lines=+1 --follow=name --retry "$log" ;;
  stop) run scancel --batch --signal=USR1 "--name=${option[name]}" ;;
  *) usage ;;
esac
