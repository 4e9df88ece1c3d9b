#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: fills in launch/cloud/jobset.yaml and applies it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
source launch/cloud/cloud.sh

usage() {
  cat <<'HELP'
Usage: launch/cloud/gke.sh --name=NAME --image=IMAGE --type=v5e|v5p|v6e|v4 --topology=AxB[xC] [options] -- flags of m2l2 train

  --image=IMAGE        made from launch/Containerfile with EXTRA=tpu, in a registry the cluster reads
  --topology=16x16     chips of one slice; a node pool of that shape must exist for each slice
  --slices=N           several slices train one model (default 1)
  --chips-per-host=N   of the node pool's machine type, ct5lp-hightpu-4t: 4 (default 4, or all chips
                       of a slice that has fewer)
  --namespace=default  --service-account=default      the latter may write to the bucket
  --max-restarts=N     after failures (default 20); preemptions are not counted
  --grace=SECONDS      to save after SIGTERM (default 600; a spot node allows about 25 in any case)
  --spot               spot nodes
  --dry-run            print the manifest, apply nothing

--workdir=gs://BUCKET/... in the flags of m2l2 train is mounted with the Cloud Storage FUSE CSI driver; the
bucket needs a hierarchical namespace (launch/cloud/cloud.sh says why), the cluster the driver and JobSet >= 0.6.
Data on gs:// are mounted read-only and cached, from any bucket.
GKE gives the workers their numbers, several slices through MEGASCALE_...: m2l2 needs only --multihost.

Example: launch/cloud/gke.sh --name=pod --image=REGISTRY/m2l2:tpu --type=v5e --topology=16x16 --slices=2 -- \
  --config=configs/pod.py --config.data.root=gs://BUCKET/music --workdir=gs://BUCKET/runs/pod

  kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME
  kubectl delete jobset NAME           makes it save and end; the same call of this script resumes
HELP
}

name='' image='' type='' topology='' slices=1 chips_per_host='' namespace=default service_account=default
max_restarts=20 grace=600 spot='' dry_run=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --name=* | --image=* | --type=* | --topology=* | --slices=* | --chips-per-host=* | --namespace=* | \
      --service-account=* | --max-restarts=* | --grace=*) take "$1" ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    *) give_up "does not know $1 (try --help)" ;;
  esac
  shift
done
[ "${1:-}" != -- ] || shift
for option in name image type topology; do
  [ -n "${!option}" ] || give_up "--$option=... is missing (try --help)"
done
for option in name namespace; do require '[a-z]([a-z0-9-]*[a-z0-9])?' "--$option" "${!option}"; done
require '[a-z0-9][a-z0-9.-]*' --service-account "$service_account"
require '[A-Za-z0-9][A-Za-z0-9._:/@-]*' --image "$image"
require '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' --topology "$topology"
for option in slices grace max_restarts; do require '[1-9][0-9]*' "--${option//_/-}" "${!option}"; done
case $type in
  v4) accelerator=tpu-v4-podslice axes=3 ;;
  v5e) accelerator=tpu-v5-lite-podslice axes=2 ;;
  v5p) accelerator=tpu-v5p-slice axes=3 ;;
  v6e) accelerator=tpu-v6e-slice axes=2 ;;
  *) give_up "--type=$type is not known: it is v4, v5e, v5p or v6e" ;;
esac
IFS=x read -ra sides <<< "$topology"
[ ${#sides[@]} = $axes ] || give_up "--topology=$topology has ${#sides[@]} axes and a $type slice has $axes"
chips=$((${topology//x/*}))
chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
require '[1248]' --chips-per-host "$chips_per_host"
((chips % chips_per_host == 0)) ||
  give_up "--topology=$topology has $chips chips, which --chips-per-host=$chips_per_host does not divide"
read_train_flags "$@"
[ -n "$bucket" ] || give_up 'give --workdir=gs://BUCKET/...: nothing else outlives a pod'

# A YAML list of strings, as JSON.
json_list() {
  local word list=()
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || give_up "a flag of m2l2 train holds a control character: $(quoted "$word")"
    word=${word//\\/\\\\}
    list+=("\"${word//\"/\\\"}\"")
  done
  local IFS=,
  printf '[%s]\n' "${list[*]}"
}

args=$(json_list train "${train[@]}" --multihost "--stopped_exit_code=$stopped_code")
args=$(sed 's/[\\&|]/\\&/g' <<< "$args")  # it goes through sed once more

marked() {  # marked WANTED MARK: what sed makes of the lines with that mark
  [ -n "$1" ] && echo "s/  # $2\$//" || echo "/  # $2\$/d"
}

manifest() {
  sed -e "$(marked "$spot" spot)" -e "$(marked "$data_bucket" data)" -e 1,2d \
    -e "s|@NAME@|$name|; s|@NAMESPACE@|$namespace|; s|@MAX_RESTARTS@|$max_restarts|; s|@SLICES@|$slices|" \
    -e "s|@HOSTS@|$((chips / chips_per_host))|; s|@CHIPS_PER_HOST@|$chips_per_host|; s|@STOPPED_CODE@|$stopped_code|" \
    -e "s|@GRACE@|$grace|; s|@SERVICE_ACCOUNT@|$service_account|; s|@ACCELERATOR@|$accelerator|" \
    -e "s|@TOPOLOGY@|$topology|; s|@IMAGE@|$image|; s|@MOUNT@|$mount_point|; s|@BUCKET@|$bucket|" \
    -e "s|@DATA_MOUNT@|$data_mount_point|; s|@DATA_BUCKET@|$data_bucket|" \
    -e "s|@ARGS@|$args|" launch/cloud/jobset.yaml
}

check_train $((chips * slices)) config
if [ -n "$dry_run" ]; then manifest; exit; fi
for program in gcloud kubectl; do
  command -v $program >/dev/null || give_up "no $program in PATH"
done
check_bucket
manifest | kubectl apply -f -
