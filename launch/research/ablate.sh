#!/usr/bin/env bash
# Ablation of the paper's choices: trains a config unchanged and once without each choice, with the same music, seed and
# chunks per step; reconstructs the same held-out excerpts with all; makes one table and one picture.
# Run it again to resume. Makes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh

case "${1:-}" in
  '' | -h | --help)
    say 'usage: ./launch/research/ablate.sh --config=configs/small.py --reference=data/music/heldout --output=runs/ablations \'
    say '         --config.data.root=data/music/train     (python launch/research/ablate.py --help: more)'
    [ $# -gt 0 ]; exit ;;
esac

make_environment .venv train
exec .venv/bin/python launch/research/ablate.py "$@"
