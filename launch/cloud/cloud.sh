# Sourced by the scripts that run m2l2 elsewhere (tpu.sh, gke.sh, slurm.sh), after environment.sh.
#
# Checkpoints on gs:// go through a mount (Cloud Storage FUSE), and that is safe only in a bucket with
# a hierarchical namespace. Orbax gives a checkpoint its name, and m2l2 its snapshot, by renaming a
# directory; in such a bucket that is one atomic step, in a flat one it is object by object, and a
# machine lost in between would leave half a checkpoint under its final name. So these scripts refuse
# flat buckets. Caches of names are turned off, so that every host sees what another has written.
# What training only reads (data_flags) is mounted once more, from any bucket: read-only, and with all names and sizes
# cached for as long as the mount lasts, so that opening a shard needs no request. No file cache: a crop is a short read
# at a random position, for which a cache would fetch the whole shard.
# A difference from a disk remains: a file is in the bucket only when it is closed, so the lines of
# metrics.jsonl since the last start are lost if a machine is lost without a warning.

mount_point=/mnt/m2l2
data_mount_point=/mnt/m2l2-data
data_flags='--config.data.root --config.evaluate.root'
stopped_code=75  # "try again": the status of m2l2 train after it was stopped and has saved

# Runs a command, or with dry_run=1 prints it as a line for a shell.
act() {
  if [ -z "${dry_run:-}" ]; then "$@"; else quoted "$@"; fi
}

quoted() {
  local words
  printf -v words ' %q' "$@"
  printf '%s\n' "${words# }"
}

take() {  # take --some-name=VALUE: sets some_name, which must not become empty
  local variable=${1%%=*}
  variable=${variable#--}
  [ -n "${1#*=}" ] || give_up "--$variable needs a value (try --help)"
  printf -v "${variable//-/_}" %s "${1#*=}"
}

require() {  # require PATTERN OPTION VALUE
  [[ $3 =~ ^($1)$ ]] || give_up "$2=$3 cannot be right: it must match $1"
}

# What follows `--`, for m2l2 train: gs://BUCKET/... becomes a path under a mount.
# Sets `train` (an array), `bucket` and `data_bucket` (empty where no flag names one).
read_train_flags() {
  local flag path place workdir=
  train=() bucket= data_bucket=
  for flag in "$@"; do
    case $flag in
      --multihost* | --stopped_exit_code* | --coordinator* | --num_processes* | --process_id*)
        give_up "${flag%%=*} is not yours to give: this script sets it" ;;
      --*=gs://*)
        path=${flag#*=gs://}
        case $path in */?*) ;; *) give_up "$flag names no folder in the bucket" ;; esac
        case " $data_flags " in
          *" ${flag%%=*} "*) in_bucket data_bucket "$flag" "${path%%/*}"; place=$data_mount_point ;;
          *) in_bucket bucket "$flag" "${path%%/*}"; place=$mount_point ;;
        esac
        flag="${flag%%=*}=$place/${path#*/}" ;;
    esac
    case $flag in --workdir=?*) workdir=$flag ;; esac
    train+=("$flag")
  done
  [ -n "$workdir" ] || give_up 'give the flags of m2l2 train after --, --workdir=... among them (try --help)'
}

# in_bucket VARIABLE FLAG BUCKET: notes the bucket, of which there is one for what is written and one for data.
in_bucket() {
  [ "${!1:-$3}" = "$3" ] ||
    give_up "$2 is in another bucket than gs://${!1}: one is mounted for data and one for all else"
  require '[a-z0-9][a-z0-9._-]*' bucket "$3"
  printf -v "$1" %s "$3"
}

# In a dry run: what m2l2 train says of its flags, as it would be with so many devices; `config` where data and
# workdir lie elsewhere. By the Python that M2L2_PYTHON names; without one there is a word of it, and no check.
check_train() {  # check_train DEVICES all|config
  [ -n "${dry_run:-}" ] || return 0
  local python=${M2L2_PYTHON:-.venv/bin/python}
  if ! [ -x "$python" ]; then
    say "$(basename "$0"): no $python here, so the flags of m2l2 train are not checked (M2L2_PYTHON names another)"
    return 0
  fi
  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$1 "$python" -m m2l2 train "${train[@]}" "--check=$2" >&2 ||
    give_up 'm2l2 train would not run so; its message is above'
}

check_bucket() {
  [ -n "$bucket" ] || return 0
  local look=(gcloud storage buckets describe "gs://$bucket" --raw '--format=value(hierarchicalNamespace.enabled)')
  if [ -n "${dry_run:-}" ]; then quoted "${look[@]}"; return; fi
  local answer
  answer=$("${look[@]}") || give_up "cannot look at gs://$bucket; the message of gcloud is above"
  [ "$answer" = True ] || give_up "gs://$bucket has no hierarchical namespace, so checkpoints in it" \
    'could be torn: make one with gcloud storage buckets create --uniform-bucket-level-access' \
    '--enable-hierarchical-namespace'
}
