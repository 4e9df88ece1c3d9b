#!/usr/bin/env bash
# What each of the paper's choices is worth: trains a config as it is and once without each of them, same music, same
# seed, same number of chunks a step; reconstructs the same held-out excerpts with all; one table and one picture.
# Run it again to go on where it stopped. Makes .venv.
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
