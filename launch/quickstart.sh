#!/usr/bin/env bash
# From nothing to music through a model, and to a model trained further: makes .venv, installs m2l2, reconstructs a
# shipped clip with `tiny`, the model in the box, then trains that on the clip and shows what changed, there and on
# another one. All is left in runs/quickstart. Run it again to go on where it stopped. Needs Python >= 3.11 and some 3
# minutes on 2 cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

case "${1:-}" in
  '') ;;
  -h | --help)
    say 'usage: ./launch/quickstart.sh      (STEPS=500 ./launch/quickstart.sh for a longer training)'
    exit 0 ;;
  *) give_up "does not know $1 (try --help)" ;;
esac

steps=${STEPS:-60}
[[ $steps =~ ^[1-9][0-9]*$ ]] || give_up "STEPS=$steps must be a whole number of steps"
run=runs/quickstart clip=m2l2/assets/clips/train/crystan-credits.ogg

make_environment .venv train
mkdir -p "$run"
say 'The model in the box: a clip through it; the first time its programs are compiled, 10 to 20 s'
.venv/bin/m2l2 reconstruct $clip "$run/reconstruction.wav" --checkpoint=tiny --overwrite
say "Listen to $run/reconstruction.wav: $clip through 345 numbers a second and channel (after $SECONDS s)"
say "Training it further, $steps steps; the first time the step is compiled, about a minute without a word"
# Nine steps of ten train the envelope alone: such a step costs a third, and gains most in minutes.
.venv/bin/m2l2 train --config=configs/tiny22.py --config.data.root=$clip \
  --config.train.init_from=m2l2/assets/models/tiny --config.train.steps="$steps" --config.train.head_start=0.9 \
  --config.train.nested=0 --config.train.ema_decay=0.98 --config.train.log_every=10 --workdir="$run"
.venv/bin/python launch/quickstart.py "$run"
say "quickstart.sh: done after $SECONDS s"
