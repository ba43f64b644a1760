#!/usr/bin/env bash
# Trains on Cloud TPU slices from queued resources, in a container on every host:
#
#   launch/tpu.sh train --name emu --zone us-east5-a --topology v5p:4x4x8 --spot \
#     --image "$IMAGE" -- --config configs/emu_14b.py --workdir gs://my-bucket/emu_14b
#
# `train` manages a whole run: it requests the slices, starts the command on every host, and does
# both again after a preemption or a failure, until training has ended. You may stop and restart
# `train` itself at any time. Its steps are also verbs:
#   create  requests the slices             stop    saves, then ends training
#   run     starts the command everywhere   delete  gives the slices back; they cost money until then
#   tail    follows the first host's log    state   prints the state of the request
# With --delete, `train` gives the slices back when training has ended or failed for good. All verbs
# accept the same options; --dry-run prints the commands. Cloud TPU chooses the layout of the chips:
# only their number is taken from --topology. For tpu7x, which Cloud TPU does not offer, use
# launch/gke.sh.
#
# Runs and data in gs:// need no mount. --bucket mounts a bucket on every host and in the container, by
# default at /bucket, for what reads local paths only. A workdir there needs a hierarchical namespace
# (docs/launch.md).
#
# Environment:
#   GRACE     seconds that training gets to save and end (default: 300)
#   POLL      seconds between checks of the slices (default: 60)
#   RESTARTS  failures, not counting preemptions, after which `train` gives up (default: 10)
#   EXTRA_FLAGS  compiler flags, appended to those of launch/flags.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$root/lib.sh"
# shellcheck source=launch/flags.sh
source "$root/flags.sh"

usage="launch/tpu.sh [--dry-run] train|create|run|tail|stop|state|delete --name NAME --zone ZONE
         --topology GENERATION:SHAPE [--slices N] --image IMAGE [--bucket NAME[:/MOUNT/POINT]]
         [--spot | --reserved] [--delete]
         [--project P] [--network N] [--subnetwork N] [--service-account A] [--runtime-version V]
         -- TRAIN_ARGUMENT..."
options='name zone topology slices image bucket project network subnetwork service-account runtime-version'
switches='dry-run spot reserved delete'
parse "$@"
need name zone

at=("--zone=${option[zone]}")
[[ -z ${option[project]:-} ]] || at+=("--project=${option[project]}")
resources=(gcloud compute tpus queued-resources)

# Sets the names that Cloud TPU uses for the accelerator and for the software of its hosts.
hardware() {
  need topology
  read_topology
  hosts=$((chips / 4))
  case $generation in
    v4) accelerator=v4-$((2 * chips)) runtime=tpu-ubuntu2204-base ;;
    v5p) accelerator=v5p-$((2 * chips)) runtime=v2-alpha-tpuv5 ;;
    v5e) accelerator=v5litepod-$chips runtime=v2-alpha-tpuv5-lite ;;
    v6e) accelerator=v6e-$chips runtime=v2-alpha-tpuv6e ;;
    tpu7x) usage "Cloud TPU does not offer tpu7x: use launch/gke.sh" ;;
  esac
  # These put eight chips on one host.
  [[ $generation == v[56]e && $chips -eq 8 ]] && hosts=1
  runtime=${option[runtime-version]:-$runtime}
}

create() {
  hardware
  local command=("${resources[@]}" create "${option[name]}" "${at[@]}"
    "--accelerator-type=$accelerator" "--runtime-version=$runtime") name
  if ((slices == 1)); then
    command+=("--node-id=${option[name]}")
  else
    command+=("--node-count=$slices" "--node-prefix=${option[name]}")
  fi
  for name in network subnetwork service-account; do
    [[ -z ${option[$name]:-} ]] || command+=("--$name=${option[$name]}")
  done
  for name in spot reserved; do
    [[ -z ${option[$name]:-} ]] || command+=("--$name")
  done
  run "${command[@]}"
}

delete() { run "${resources[@]}" delete "${option[name]}" "${at[@]}" --force --quiet; }

# Runs the shell command `$2` on the first host, or on `all` of them.
on_hosts() {
  run "${resources[@]}" ssh "${option[name]}" "${at[@]}" --quiet "--node=$1" "--worker=$1" \
    "--command=$2"
}

# Prints the shell command that mounts the bucket on a host, and installs gcsfuse if missing. It
# replaces an earlier mount, which may be dead or of another bucket. Metadata is not cached, because
# another host may have changed a file.
mount_bucket() {
  local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/gcsfuse.asc
  echo "{ command -v gcsfuse >/dev/null || {" \
    "curl -fsS $packages/doc/apt-key.gpg | sudo tee $key >/dev/null &&" \
    "echo \"deb [signed-by=$key] $packages gcsfuse-\$(lsb_release -cs) main\" |" \
    "sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&" \
    "sudo apt-get -o DPkg::Lock::Timeout=300 -qq update &&" \
    "sudo apt-get -o DPkg::Lock::Timeout=300 -qq install gcsfuse; }; } &&" \
    "{ sudo umount --lazy $mount_point 2>/dev/null || true; } &&" \
    "sudo mkdir -p $mount_point && sudo gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0" \
    "--metadata-cache-negative-ttl-secs=0 $bucket $mount_point && "
}

# Starts the container on every host, after the previous one has saved and stopped. It runs as root,
# which owns the chips' device files.
start() {
  hardware
  need image
  need_train
  read_bucket
  local image=${option[image]} remote container
  local registry=${image%%/*}
  container=(sudo docker run --detach --name emu-jax --pull always --privileged --user root
    --network host --stop-timeout "${GRACE:-300}" --env "JAX_NUM_PROCESSES=$((hosts * slices))"
    --env "$(flags_variable "$generation" "$slices")")
  [[ -z $bucket ]] || container+=(--volume "$mount_point:$mount_point")
  container+=("$image" train "${train[@]}")
  remote="rm -f emu-jax.stopped; { sudo docker stop emu-jax; sudo docker rm emu-jax; } >/dev/null 2>&1; "
  [[ -z $bucket ]] || remote+=$(mount_bucket)
  [[ $registry != *.* || $registry == "$image" ]] ||
    remote+="sudo gcloud auth configure-docker --quiet $(quote "$registry") && "
  on_hosts all "$remote$(quote "${container[@]}")"
}

# Prints the state of the request: WAITING_FOR_RESOURCES, ..., ACTIVE, ..., SUSPENDED, FAILED; ABSENT
# if there is no such request; UNKNOWN if the query failed.
state() {
  local answer
  if answer=$("${resources[@]}" describe "${option[name]}" "${at[@]}" \
    "--format=value(state.state)" 2>&1); then
    # gcloud may print warnings around it.
    grep -xE '[A-Z_]+' <<<"$answer" || echo UNKNOWN
  elif grep -qiE 'NOT_FOUND|not found' <<<"$answer"; then
    echo ABSENT
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

# Prints the state of the first host's container: `running 0`, `exited STATUS`, `stopped` (by the
# verb), `none`; nothing if the host does not answer.
container() {
  on_hosts 0 "test -e emu-jax.stopped && echo stopped ||
    sudo docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' emu-jax 2>/dev/null ||
    echo none" 2>/dev/null | tail -n 1 || true
}

# Keeps the run going until training has ended, and returns its status. The states of the request
# and of the container determine what to do, whatever happened in between. The only memory is `ours`:
# whether this script started the container or saw it running.
supervise() {
  local now before='' does='' ours='' failures=0
  while true; do
    now=$(state)
    [[ $now == "$before" ]] || say "$now"
    before=$now
    case $now in
      ABSENT)
        ours=''
        create || fail "the slices could not be asked for" ;;
      SUSPENDED | FAILED)
        [[ $now == SUSPENDED ]] || fail "the request failed"
        ours=''
        { delete && create; } || fail "the slices could not be asked for again" ;;
      ACTIVE)
        does=$(container)
        case $ours:$does in
          *:) ;; # no answer, perhaps a preemption: the state will show it
          *:running*) ours=yes ;;
          yes:'exited 0') return 0 ;;
          yes:'exited 2') say "training ended with status 2: its log has the reason"; return 2 ;;
          yes:stopped) return 130 ;;
          *)
            # 130: saved and stopped by a signal. A preemption is not a failure.
            [[ -z $ours || $does == 'exited 130' ]] || fail "training: $does"
            if start; then ours=yes; else fail "the command could not be started"; fi ;;
        esac ;;
    esac
    sleep "${POLL:-60}"
  done
}

say() { echo "$(date '+%F %T') ${option[name]}: $1" >&2; }

# Counts a failure, and gives up after too many.
fail() {
  say "$1 (failure $((++failures)) of ${RESTARTS:-10})"
  ((failures < ${RESTARTS:-10})) || finish 1
}

# Ends `train`. With --delete it gives the slices back, unless `stop` ended training.
finish() {
  [[ -z ${option[delete]:-} || $1 -eq 130 ]] || delete
  exit "$1"
}

case $verb in
  create) create ;;
  run) start ;;
  tail) on_hosts 0 'sudo docker logs --follow emu-jax' ;;
  stop) on_hosts all 'touch emu-jax.stopped; sudo docker stop emu-jax' ;;
  state) if [[ ${option[dry-run]:-} ]]; then
      run "${resources[@]}" describe "${option[name]}" "${at[@]}" "--format=value(state.state)"
    else
      state
    fi ;;
  delete) delete ;;
  train)
    hardware
    need image
    need_train
    read_bucket
    status=0
    if [[ ${option[dry-run]:-} ]]; then
      create
      start
    else
      supervise || status=$?
    fi
    finish "$status" ;;
  *) usage ;;
esac
