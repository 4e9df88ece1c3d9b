#!/usr/bin/env bash
# Trains `small` on hours of music in 40 MB: packs them (launch/research/pack.py), trains, and writes the averaged
# weights in bfloat16, in files below 16 MB, to WORKDIR/box.
# Run it again to resume; completed parts are not repeated.
#   ./launch/research/train_small.sh [OPTIONS] [-- --config.train.batch_size=32 ...]
#     --music=DIR       (data/music/train, of launch/get_music.sh; not needed if the pack exists)
#     --pack=DIR        (data/pack)
#     --config=FILE     (configs/small.py)
#     --workdir=DIR     (runs/small)
#     --minutes=M       limit of training time, then saves and writes the box; the next call resumes (default: none)
#     --python=PROGRAM  one that has m2l2 (default: makes .venv)
#     --dry-run         prints the commands
# The pack is mono Opus of some 34 kbit/s: 2.5 hours at 48 kbit/s would be 54 MB.
# For one GPU. m2l2.load('WORKDIR/box/small') loads the result, as does --checkpoint=WORKDIR/box/small.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh

music=data/music/train pack=data/pack config=configs/small.py workdir=runs/small minutes='' python='' dry_run=''
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit ;;
    --music=*) music=${1#*=} ;;
    --pack=*) pack=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --minutes=*) minutes=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) give_up "does not know $1 (try --help)" ;;
  esac
  shift
done
[[ $minutes =~ ^([1-9][0-9]*)?$ ]] || give_up "--minutes=$minutes must be a whole number of minutes"

do_it() { if [ -n "$dry_run" ]; then printf '%s\n' "${*@Q}"; else "$@"; fi; }

if [ -z "$python" ]; then
  python=.venv/bin/python
  [ -n "$dry_run" ] || make_environment .venv train
fi
if [ ! -e "$pack/pack.json" ]; then
  [ -n "$dry_run" ] || [ -d "$music" ] || give_up "neither $pack nor $music is there: run ./launch/get_music.sh first"
  do_it "$python" launch/research/pack.py --input="$music" --output="$pack" --shares="$(
    [ ! -d "$music/warzone2100-music" ] || printf warzone2100-music=0.5)"  # its 48 kbit/s are heard
fi
limit=()
[ -z "$minutes" ] || limit=(timeout --preserve-status --signal=TERM "${minutes}m")
stopped=75 code=0
do_it ${limit[@]+"${limit[@]}"} "$python" -m m2l2 train --config="$config" --config.data.root="$pack" \
  --workdir="$workdir" --stopped_exit_code=$stopped "$@" || code=$?
if [ -n "$minutes" ] && [ $code != 0 ] && [ ! -e "$workdir/snapshot/config.json" ] && [ -z "$dry_run" ]; then
  give_up "no step was done in $minutes minutes (status $code): give more"
fi
[ $code = 0 ] || [ $code = $stopped ] || exit $code
do_it "$python" launch/research/ship.py "$workdir" small --box="$workdir/box"
[ $code = 0 ] || say 'not at the end yet: run the same command to go on'
