#!/usr/bin/env bash
# From nothing to a trained model and a reconstruction: makes .venv, installs m2l2, trains `tiny` on the
# shipped clips, and leaves sounds, a picture and figures in runs/quickstart. Run it again to go on where
# it stopped. Needs Python >= 3.11 and about 8 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

case "${1:-}" in
  '') ;;
  -h | --help)
    say 'usage: ./launch/quickstart.sh      (STEPS=200 ./launch/quickstart.sh for a shorter run)'
    exit 0 ;;
  *) give_up "does not know $1 (try --help)" ;;
esac

steps=${STEPS:-800}
[[ $steps =~ ^[1-9][0-9]*$ ]] || give_up "STEPS=$steps must be a whole number of steps"

make_environment .venv train
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$PWD/.venv/$(compilation_cache)}
.venv/bin/m2l2 train --config=configs/tiny.py --config.data.root=m2l2/assets/clips/train \
  --config.train.steps="$steps" --config.train.head_start=0.75 --workdir=runs/quickstart
.venv/bin/python launch/quickstart.py runs/quickstart
