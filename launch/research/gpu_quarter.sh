#!/usr/bin/env bash
# Nine minutes on one GPU without network: its tests, the benchmarks, then `small` trained from a pack. The results
# are written to OUTPUT, in few files below 16 MB: checks.log, train.log, metrics.jsonl, and the averaged weights in
# bfloat16 (box/small). Run it again to resume; on a machine with OUTPUT but without the workdir it continues
# from those weights.
#   ./launch/research/gpu_quarter.sh [OPTIONS] [-- --config.train.batch_size=32 ...]
#     --minutes=M      total time (9)
#     --output=DIR     (runs/gpu)
#     --workdir=DIR    (runs/small)
#     --pack=DIR       output of launch/research/pack.py (data/pack)
#     --config=FILE    (configs/small.py)
#     --python=PROGRAM one that has JAX for this GPU (python3)
#     --wheels=DIR     wheels to install first: grain, soundfile, soxr, ml_collections, clu, ...
#     --no-checks      training alone, as in a second call
# Rehearse it on a CPU: ./launch/research/gpu_quarter.sh --minutes=3 --config=configs/small.py:debug --python=.venv-test/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
SECONDS=0

minutes=9 output=runs/gpu workdir=runs/small pack=data/pack config=configs/small.py python=python3 wheels='' checks=1
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit ;;
    --minutes=*) minutes=${1#*=} ;;
    --output=*) output=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --pack=*) pack=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --wheels=*) wheels=${1#*=} ;;
    --no-checks) checks='' ;;
    --) shift; break ;;
    *) give_up "does not know $1 (try --help)" ;;
  esac
  shift
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || give_up "--minutes=$minutes must be a whole number of minutes"
[ -e "$pack/pack.json" ] || give_up "$pack is no pack: python launch/research/pack.py --output=$pack makes one"
mkdir -p "$output"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --find-links="$wheels" "$wheels"/*.whl >&2
fi
device=$("$python" -c 'import jax; print(jax.__version__, jax.devices()[0].device_kind)')
say "$device"

if [ -n "$checks" ] && [ ! -e "$output/checks.log" ]; then
  { printf '%s\n' "$device"
    JAX_PLATFORMS= timeout 120 "$python" -m pytest -q tests/test_kernels.py -m gpu ||
      printf 'the tests failed or did not end\n'
    timeout 120 "$python" launch/bench/bench.py --config="$config" --only=train,attention --no-pairs ||
      printf 'the benchmarks failed or did not end\n'
  } > "$output/checks.part" 2>&1
  mv "$output/checks.part" "$output/checks.log"
  say "-- tests and benchmarks: $SECONDS s, see $output/checks.log"
fi

# What remains, less a minute in which the weights are written.
rest=$(( minutes - (SECONDS + 59) / 60 - 1 ))
[ $rest -ge 1 ] || give_up "no minute is left for training after $SECONDS s: give more"
onward=()
if [ -e "$output/box/small/config.json" ] && [ ! -e "$workdir/checkpoints" ]; then
  say "going on from the weights in $output/box/small"
  onward=(--config.train.init_from="$output/box/small")
fi
./launch/research/train_small.sh --pack="$pack" --config="$config" --workdir="$workdir" --minutes=$rest --python="$python" \
  -- "$@" ${onward[@]+"${onward[@]}"} 2>&1 | tee -a "$output/train.log" >&2
rm -rf "$output/box.part"
cp -r "$workdir/box" "$output/box.part"
rm -rf "$output/box"
mv "$output/box.part" "$output/box"
cp "$workdir/metrics.jsonl" "$output/metrics.jsonl"
say "gpu_quarter.sh: done after $SECONDS s, all in $output"
