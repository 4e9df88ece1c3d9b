#!/usr/bin/env bash
# From nothing to music through a model, and to a model that learns: makes .venv, installs m2l2, reconstructs two shipped
# clips with `tiny`, the model in the box (it was trained on the first one's package, and never heard the second), then
# trains a small model on the first clip alone and shows what it learned of it. All is left in runs/quickstart. Run it
# again to go on where it stopped. Needs Python >= 3.11 and some 3 minutes on 2 cores.
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
run=runs/quickstart clip=m2l2/assets/clips/train/crystan-credits.ogg heldout=m2l2/assets/clips/heldout/savino-palace.ogg

make_environment .venv train
unset PYTHONDONTWRITEBYTECODE  # four processes import the same: where it is set, each parses all of it again
mkdir -p "$run"
say 'The model in the box: a clip through it; the first time its programs are compiled, 10 to 20 s'
.venv/bin/m2l2 reconstruct $clip "$run/reconstruction.wav" --checkpoint=tiny --overwrite
say "Listen to $run/reconstruction.wav: $clip through 345 numbers a second and channel (after $SECONDS s)"
.venv/bin/m2l2 reconstruct $heldout "$run/heldout_reconstruction.wav" --checkpoint=tiny --overwrite
say "Learning: a small model, $steps steps on that clip alone; its programs are compiled first, most of a minute"
# Head start alone: one step from pure noise is to have the clip's magnitudes. The whole recipe takes 20 minutes
# on one core (configs/clip.py).
.venv/bin/m2l2 train --config=configs/clip.py --config.data.root=$clip --config.train.steps="$steps" \
  --config.variants.head_start.share=1 --config.variants.head_start.task=magnitudes --config.train.batch_size=2 \
  --config.train.warmup_steps=10 --config.train.probe_every=0 --workdir="$run"
.venv/bin/python launch/quickstart.py "$run"
say "quickstart.sh: done after $SECONDS s"
