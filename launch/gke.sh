#!/usr/bin/env bash
# Trains on the TPU slices of a GKE cluster, as a JobSet:
#
#   launch/gke.sh pool --name emu --cluster pods --location us-east5-a --topology v5p:4x4x8 --spot
#   launch/gke.sh run --name emu --topology v5p:4x4x8 --spot \
#     --image "$IMAGE" -- --config configs/emu_14b.py --workdir gs://my-bucket/emu_14b
#
#   pool   creates a node pool for each slice  stop    saves, then ends training
#   run    (re)starts training                 delete  removes the node pools, which cost until then
#   tail   follows the first host's log        yaml    prints the JobSet
# All verbs accept the same options; --dry-run prints the commands. The cluster needs JobSet, and
# kubectl must point to the cluster (docs/launch.md). JobSet restarts everything when a host fails or
# is preempted; preemptions do not count as failures.
#
# Runs and data in gs:// need no mount; pods reach them as the nodes' service account. --bucket mounts
# a bucket in every pod, by default at /bucket, for what reads local paths only: by the cluster's Cloud
# Storage FUSE driver and as the pods' Kubernetes service account. A workdir there needs a hierarchical
# namespace. The account needs access to the bucket (docs/launch.md).
#
# Environment:
#   GRACE     seconds that training gets to save and end (default: 300)
#   RESTARTS  failures, not counting preemptions, after which JobSet gives up (default: 10)
#   EXTRA_FLAGS  compiler flags, appended to those of launch/flags.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$root/lib.sh"
# shellcheck source=launch/flags.sh
source "$root/flags.sh"

usage="launch/gke.sh [--dry-run] pool|run|tail|stop|delete|yaml --name NAME
         --topology GENERATION:SHAPE [--slices N] --image IMAGE [--bucket NAME[:/MOUNT/POINT]]
         [--spot | --reservation R]
         --cluster C --location ZONE [--project P] [--namespace N] [--service-account A]
         -- TRAIN_ARGUMENT..."
options='name topology slices image bucket reservation cluster location project namespace service-account'
switches='dry-run spot'
parse "$@"
need name
name=${option[name]}
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
  usage "invalid --name '$name': use lower-case letters, digits and dashes, as Kubernetes requires"
namespace="--namespace=${option[namespace]:-default}"

# Sets the names that GKE uses for the nodes. All of these have four chips.
hardware() {
  need topology
  read_topology
  hosts=$((chips / 4))
  case $generation in
    v4) machine=ct4p-hightpu-4t accelerator=tpu-v4-podslice ;;
    v5e) machine=ct5lp-hightpu-4t accelerator=tpu-v5-lite-podslice ;;
    v5p) machine=ct5p-hightpu-4t accelerator=tpu-v5p-slice ;;
    v6e) machine=ct6e-standard-4t accelerator=tpu-v6e-slice ;;
    tpu7x) machine=tpu7x-standard-4t accelerator=tpu7x ;;
  esac
}

# Sets the last arguments of every gcloud command on the cluster.
where() {
  need cluster location
  at=("--cluster=${option[cluster]}" "--location=${option[location]}")
  [[ -z ${option[project]:-} ]] || at+=("--project=${option[project]}")
}

pool() {
  hardware
  where
  local i more=()
  [[ -z ${option[spot]:-} ]] || more+=(--spot)
  [[ -z ${option[reservation]:-} ]] ||
    more+=(--reservation-affinity=specific "--reservation=${option[reservation]}")
  if [[ $generation == tpu7x ]]; then
    # Its pools take the placement of hosts from a policy, which belongs to a region.
    run gcloud compute resource-policies create workload-policy "$name" --type=HIGH_THROUGHPUT \
      "--accelerator-topology=$shape" "--region=${option[location]%-?}" "${at[@]:2}"
    more+=("--placement-policy=$name")
  fi
  for ((i = 0; i < slices; i++)); do
    run gcloud container node-pools create "$name-$i" "${at[@]}" "--machine-type=$machine" \
      "--tpu-topology=$shape" "--num-nodes=$hosts" --scopes=cloud-platform "${more[@]}"
  done
}

# Prints a YAML string in double quotes.
yaml_string() {
  local text=${1//\\/\\\\}
  echo "\"${text//\"/\\\"}\""
}

# Prints the JobSet: one Job per slice, one pod per host. A failed pod fails its Job, and the JobSet
# then restarts all of them.
yaml() {
  hardware
  need image
  need_train
  read_bucket
  local word args='' variable spot='' annotations='' mounts='' volumes=''
  for word in train "${train[@]}"; do
    args+="
                    - $(yaml_string "$word")"
  done
  variable=$(flags_variable "$generation" "$slices")
  [[ -z ${option[spot]:-} ]] || spot='
                cloud.google.com/gke-spot: "true"'
  # The container that mounts the bucket has no limits, so that checkpoints of any size pass. Metadata
  # is not cached, because another host may have changed a file.
  [[ -z $bucket ]] || annotations='
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
                gke-gcsfuse/cpu-limit: "0"
                gke-gcsfuse/memory-limit: "0"
                gke-gcsfuse/ephemeral-storage-limit: "0"' mounts="
                  volumeMounts: [{name: bucket, mountPath: $mount_point}]" volumes="
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $(yaml_string "$bucket")
                      mountOptions: implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
                      hostNetworkPodKSA: \"true\""
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # A slice is a node pool, and no two Jobs share a slice.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-10}
    rules:
      - name: preempted
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
          template:$annotations
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: ${GRACE:-300}
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              serviceAccountName: ${option[service-account]:-default}
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $shape$spot
              tolerations:
                - {key: google.com/tpu, operator: Exists, effect: NoSchedule}
                - {key: cloud.google.com/gke-spot, operator: Exists, effect: NoSchedule}
              containers:
                - name: emu-jax
                  image: $(yaml_string "${option[image]}")
                  imagePullPolicy: Always
                  args:$args
                  env:
                    # GKE sets the rest: this host's number, and the first host's address.
                    - {name: JAX_NUM_PROCESSES, value: "$((hosts * slices))"}
                    - name: ${variable%%=*}
                      value: $(yaml_string "${variable#*=}")
                  securityContext: {privileged: true, runAsUser: 0}  # the chips' device files
                  ports: [{containerPort: 8471}, {containerPort: 8080}, {containerPort: 8482}]
                  resources:
                    limits: {google.com/tpu: 4}$mounts$volumes
END
}

# Removes the JobSet and waits until its pods have saved and ended.
stop() {
  run kubectl delete jobset "$name" "$namespace" --ignore-not-found --cascade=foreground
}

case $verb in
  pool) pool ;;
  yaml) yaml ;;
  run)
    manifest=$(yaml)
    stop
    feed "$manifest" kubectl create "$namespace" --filename=- ;;
  tail)
    run kubectl logs --follow "$namespace" --max-log-requests=1 "--selector=$(
      )jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,$(
      )batch.kubernetes.io/job-completion-index=0" ;;
  stop) stop ;;
  delete)
    where
    slices=$(number slices 1)
    stop
    for ((i = 0; i < slices; i++)); do
      run gcloud container node-pools delete "$name-$i" "${at[@]}" --quiet
    done ;;
  *) usage ;;
esac
