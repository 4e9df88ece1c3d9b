#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster; the job goes back into the queue until training is done.
set -euo pipefail

# As a batch job (first argument `batch`) this is a copy somewhere else, started in the repository.
[ "${1:-}" = batch ] || cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
source launch/cloud/cloud.sh

usage() {
  cat <<'HELP'
Usage: launch/cloud/slurm.sh --nodes=N --gpus=G [options] -- flags of m2l2 train

  --nodes=N --gpus=G   nodes, and GPUs of each node (default 1 and 8)
  --cpus=C             for each GPU, to decode music (default 8)
  --name=NAME          of the job (default m2l2); --time=HH:MM:SS a turn (default 24:00:00)
  --partition=P --account=A --qos=Q --constraint=C      as for sbatch
  --python=FILE        of the environment that m2l2[train,cuda] is installed in (default .venv/bin/python)
  --image=IMAGE        run in a container (Slurm's --container-image, of the pyxis plugin); built from
                       launch/Containerfile with EXTRA=cuda; --mounts=FROM:TO,... the mounted folders
  --notice=SECONDS     SIGTERM is sent this long before the time limit, and m2l2 saves (default 300)
  --attempts=N         failures within 10 minutes of a start after which it ends (default 5)
  --dry-run            print the sbatch call, and the srun call that the job makes

One process for each GPU: jax gives process i of a node the GPU i, and would leave the others of the node
idle with one process a node. The workdir and the music must be on a file system that all nodes share.
The job's log is slurm-JOB.out in the current folder, one file for all restarts.

Example: launch/cloud/slurm.sh --nodes=4 --gpus=8 --partition=gpu -- \
  --config=configs/pod.py --config.train.batch_size=256 --config.data.root=/data/music --workdir=/data/runs/pod
HELP
}

nodes=1 gpus=8 cpus=8 name=m2l2 time=24:00:00 python=.venv/bin/python image='' mounts='' notice=300 attempts=5
dry_run='' wishes=() inside='' given=("$@")
if [ "${1:-}" = batch ]; then inside=1; shift; fi
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --nodes=* | --gpus=* | --cpus=* | --name=* | --time=* | --python=* | --image=* | --mounts=* | --notice=* | \
      --attempts=*) take "$1" ;;
    --partition=?* | --account=?* | --qos=?* | --constraint=?*) wishes+=("$1") ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit 0 ;;
    *) give_up "does not know $1 (try --help)" ;;
  esac
  shift
done
[ "${1:-}" != -- ] || shift
for number in nodes gpus cpus notice attempts; do require '[1-9][0-9]*' "--$number" "${!number}"; done
read_train_flags "$@"
[ -z "$bucket" ] || give_up "gs://$bucket is not mounted by this script: give paths that all nodes share"

# jax picks the GPU itself, by SLURM_LOCALID; some Slurms (22.05 to 23.02) do not hand the job's CPUs on to its steps.
step=(srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$cpus")
if [ -n "$image" ]; then
  step+=(--container-image="$image" ${mounts:+"--container-mounts=$mounts"})
  python=python
fi
# The last word replaces its parent: Slurm signals the task itself and not what it has started.
step+=("$python" -m m2l2 train "${train[@]}" --multihost "--stopped_exit_code=$stopped_code")

if [ -z "$inside" ]; then
  [ -n "$dry_run" ] || command -v sbatch >/dev/null || give_up 'no sbatch in PATH: run this where jobs are submitted'
  [ -n "$dry_run$image" ] || [ -x "$python" ] ||
    give_up "no $python: make an environment with m2l2[train,cuda] and name it with --python=..."
  [ -n "$image" ] || M2L2_PYTHON=${M2L2_PYTHON:-$python} check_train $((nodes * gpus)) all
  passed=()
  for word in "${given[@]}"; do [ "$word" = --dry-run ] || passed+=("$word"); done
  # --signal without B: to the processes of srun, not to this script's copy.
  act sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
    --cpus-per-task="$cpus" --time="$time" --signal="TERM@$notice" --requeue --open-mode=append \
    --chdir="$PWD" ${wishes[@]+"${wishes[@]}"} launch/cloud/slurm.sh batch "${passed[@]}"
  [ -z "$dry_run" ] || quoted "${step[@]}"
  exit
fi

trap : TERM  # preemption: Slurm tells this shell too, which waits for the processes to save
code=0
"${step[@]}" || code=$?
if [ $code = 0 ]; then
  say 'slurm.sh: training is done'
elif [ $code = "$stopped_code" ] || ((SECONDS >= 600)) || ((${SLURM_RESTART_COUNT:-0} + 1 < attempts)); then
  say "slurm.sh: exit code $code; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || exit $code
else
  give_up "exit code $code, soon after start $attempts: giving up"
fi
