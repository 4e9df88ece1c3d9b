#!/usr/bin/env bash
# Trains on Cloud TPU slices: requests them, installs m2l2, runs, restarts, deletes them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
source launch/cloud/cloud.sh

usage() {
  cat <<'HELP'
Usage: launch/cloud/tpu.sh COMMAND --name=NAME [options] [-- flags of m2l2 train]

  create   request the slices (a queued resource, which may take minutes or days)
  setup    install m2l2[train,tpu] on all workers, from a commit of this checkout
  run      start training on all workers, detached; failures restart it (launch/cloud/restart.sh)
  keep     all of these, and again whenever the slices are preempted, until training is done; it runs in
           the foreground, so start it in tmux on a machine that stays on
  status   the state of the slices, and of training on each worker
  logs     follow the log of the first worker (~/m2l2-run/train.log on each)
  stop     make training save and end; run resumes it
  delete   delete the slices

  --name=NAME        of the queued resource (TPU_NAME)
  --type=TYPE        v5litepod-256, v5p-512, v6e-256, ... (TPU_TYPE; create and keep need it)
  --slices=N         several slices of that type train one model (default 1)
  --zone=Z --project=P      (TPU_ZONE, TPU_PROJECT; else those of gcloud's config)
  --runtime=VERSION  of the TPU software (default: the one for the type)
  --network=N --subnetwork=N --service-account=EMAIL --internal-ip
  --spot, --reserved preemptible, or reserved capacity
  --ref=COMMIT       the commit that setup installs (default HEAD; uncommitted changes are not installed)
  --poll=SECONDS     interval of keep's checks (default 60)
  --recreations=N    how often keep requests new slices before it gives up (default 100)
  --dry-run          print the commands, run none

The workdir must be on storage that all workers share. gs://BUCKET/... in the flags of m2l2 train is
mounted with Cloud Storage FUSE: data read-only and cached, from any bucket; the one with the workdir needs a
hierarchical namespace (launch/cloud/cloud.sh says why).
Workers find each other through the metadata of their machines, several slices through the
MEGASCALE_... entries of the queued resource: m2l2 needs only --multihost.

Example: launch/cloud/tpu.sh keep --name=pod --type=v5litepod-256 --zone=us-west4-a --spot -- \
  --config=configs/pod.py --config.data.root=gs://BUCKET/music --workdir=gs://BUCKET/runs/pod
HELP
}

command=${1:-} && [ $# = 0 ] || shift
case $command in
  create | setup | run | keep | status | logs | stop | delete) ;;
  -h | --help | help) usage; exit 0 ;;
  '') give_up 'which command? (try --help)' ;;
  *) give_up "does not know the command $command (try --help)" ;;
esac

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-}
slices=1 runtime='' ref=HEAD poll=60 recreations=100 dry_run='' internal=() wishes=() options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --slices=* | --runtime=* | --ref=* | --poll=* | --recreations=*) take "$1" ;;
    --network=?* | --subnetwork=?* | --service-account=?* | --spot | --reserved) wishes+=("$1") ;;
    --internal-ip) internal=(--internal-ip) wishes+=(--internal-ips) ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    *) give_up "does not know $1 (try --help)" ;;
  esac
  shift
done
[ "${1:-}" != -- ] || shift
[ -n "$name" ] || give_up '--name=... is missing (try --help)'
require '[a-z][a-z0-9-]*' --name "$name"
for number in slices poll recreations; do require '[1-9][0-9]*' "--$number" "${!number}"; done
where=(${zone:+"--zone=$zone"} ${project:+"--project=$project"})
case $command in
  run | keep) read_train_flags "$@" ;;
  *) [ $# = 0 ] || [ "$command" = setup ] || give_up "$command takes no flags of m2l2 train" ;;
esac
case $command in create | keep) [ -n "$type" ] || give_up '--type=... is missing (try --help)' ;; esac
[ -n "$dry_run" ] || command -v gcloud >/dev/null || give_up 'no gcloud in PATH: install the Google Cloud CLI'

tpus() { act gcloud compute tpus queued-resources "$@"; }

on() {  # on WORKERS NODES COMMAND
  tpus ssh "$name" ${where[@]+"${where[@]}"} ${internal[@]+"${internal[@]}"} --worker="$1" --node="$2" --command="$3"
}

create() {
  local shape=(--node-id="$name")
  [ "$slices" = 1 ] || shape=(--node-count="$slices" --node-prefix="$name")
  if [ -z "$runtime" ]; then
    case $type in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v[234]-*) runtime=tpu-ubuntu2204-base ;;
      *) give_up "knows no TPU software for --type=$type: name it with --runtime=..." ;;
    esac
  fi
  # The scope lets the workers write to the bucket; what they may do there, IAM says.
  tpus create "$name" ${where[@]+"${where[@]}"} "${shape[@]}" --accelerator-type="$type" --runtime-version="$runtime" \
    --scopes=https://www.googleapis.com/auth/cloud-platform ${wishes[@]+"${wishes[@]}"}
}

setup() {
  local bundle=${TMPDIR:-/tmp}/m2l2-$name.tar.gz
  git rev-parse --quiet --verify "$ref^{commit}" >/dev/null || give_up "--ref=$ref is no commit of this checkout"
  [ "$ref" != HEAD ] || git diff --quiet HEAD || say 'tpu.sh: what is not committed is not installed'
  act git archive --format=tar.gz --output="$bundle" "$ref"
  tpus scp "$bundle" "$name:m2l2.tar.gz" ${where[@]+"${where[@]}"} ${internal[@]+"${internal[@]}"} --worker=all --node=all
  on all all 'rm -rf m2l2 && mkdir m2l2 && tar -xzf m2l2.tar.gz -C m2l2 && bash m2l2/launch/cloud/worker.sh setup'
}

devices() {  # of the type, as JAX counts them
  local count=${type##*-}
  case $type in
    v4-* | v5p-*) count=$((count / 2)) ;;  # named by their cores, of which two are a device
    *-[0-9]*) ;;
    *) count=1 ;;
  esac
  echo $((count * slices))
}

run() {
  check_train "$(devices)" config
  check_bucket
  on all all "bash m2l2/launch/cloud/worker.sh start $(
    quoted "${bucket:--}" "${data_bucket:--}" "${train[@]}" --multihost --stopped_exit_code=$stopped_code)"
}

state() {
  tpus list ${where[@]+"${where[@]}"} --filter="name~/$name\$" '--format=value(state.state)'
}

# Everything that a lost slice needs again is done by this script anew, so that one failed command
# (a worker that does not answer yet) is another try at the next look, and not the end.
keep() {
  local self=(bash launch/cloud/tpu.sh) now created=0 finished
  if [ -n "$dry_run" ]; then
    say 'until training is done, every' "$poll" 's:'
    state
    say 'not there, SUSPENDED or FAILED (then deleted first):'
    "${self[@]}" create "${options[@]}"
    say 'ACTIVE:'
    on 0 0 'bash m2l2/launch/cloud/worker.sh outcome || echo absent'
    say 'ACTIVE, and the workers are new:'
    "${self[@]}" setup "${options[@]}"
    "${self[@]}" run "${options[@]}" -- "$@"
    return
  fi
  check_bucket
  while :; do
    now=$(state) || now=unknown
    case $now in
      ACTIVE)
        finished=$(on 0 0 'bash m2l2/launch/cloud/worker.sh outcome || echo absent') || finished=unknown
        case $finished in
          *done) say "tpu.sh: training has ended, done or stopped; launch/cloud/tpu.sh delete gives $name back"; return ;;
          *failed) give_up "training failed too often: see launch/cloud/tpu.sh logs --name=$name" ;;
          *absent) "${self[@]}" setup "${options[@]}" && "${self[@]}" run "${options[@]}" -- "$@" ||
            say 'tpu.sh: the workers are not ready; trying again' ;;
        esac ;;
      '' | SUSPENDED | FAILED)
        created=$((created + 1))
        ((created <= recreations)) || give_up "asked for $name $recreations times; giving up"
        say "tpu.sh: $name is ${now:-not there}: asking for it (time $created)"
        if [ -n "$now" ]; then "${self[@]}" delete "${options[@]}" || true; fi
        "${self[@]}" create "${options[@]}" || say 'tpu.sh: not granted; trying again' ;;
    esac
    sleep "$poll"
  done
}

case $command in
  keep) keep "$@" ;;
  status) state; on all all 'bash m2l2/launch/cloud/worker.sh outcome; tail -n 1 m2l2-run/train.log 2>/dev/null || true' ;;
  logs) on 0 0 'tail -n 100 -F m2l2-run/train.log' ;;
  stop) on all all 'bash m2l2/launch/cloud/worker.sh stop' ;;
  delete) tpus delete "$name" ${where[@]+"${where[@]}"} --force --quiet ;;
  *) "$command" ;;
esac
