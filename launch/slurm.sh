#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster, one process a GPU, in a container (pyxis) or from a
# virtual environment that every node sees:
#
#   launch/slurm.sh run --name emu --nodes 16 --image my-registry#emu/gpu --mount /data:/data -- \
#     --config configs/emu_14b.py --workdir /data/runs/emu_14b
#   launch/slurm.sh run --name emu --nodes 16 --venv /data/emu_jax/.venv -- ...
#
#   run   queues training    tail  follows its log    stop  lets it save and end
# The same options may stand with every verb; --dry-run prints what would be run. The job saves
# before its time is over or another takes its place, and queues itself again, under the same
# number and with the same log, until training has ended. Environment:
#   GRACE     seconds that training has to save and end when it is stopped (default: 300)
#   RESTARTS  restarts of the job after which failures end it (default: 10)
#   EXTRA_FLAGS  for the compiler, after those of launch/flags.sh
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

# The batch script. SLURM tells JAX who is who: all that it needs is how many they are. Every
# task sees all GPUs of its node, and JAX gives it the one of its local number.
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

# \`launch/slurm.sh stop\` sends USR1: training is told to save and end, and the job ends too.
stopped=
trap 'stopped=yes; kill -TERM \$step' USR1
$(quote "${step[@]}" train "${train[@]}") &
step=\$!
wait \$step; status=\$?
[[ ! \$stopped ]] || { wait \$step; status=\$?; }
echo "training ended with status \$status (start \$((\${SLURM_RESTART_COUNT:-0} + 1)))" >&2

# 0: done. 2: a mistake that starting again does not mend. 130: it saved before the time was over.
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
    [[ -z ${option[image]:-} || -z ${option[venv]:-} ]] || usage "--image or --venv, not both"
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
