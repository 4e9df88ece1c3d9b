"""A first model in a minute or two of a CPU, for whoever has none yet: `tiny`, trained on the shipped clips.

It learns the loudness of each band over each chunk, a rough sketch of the music and no more. The notebooks in
colabs/ share one such model.
"""

from importlib import resources
import json
from pathlib import Path

from m2l2.codec import Codec, load, locate
from m2l2.configs import tiny
from m2l2.errors import UserError
from m2l2.snapshot import load_snapshot

CLIPS = Path(str(resources.files('m2l2') / 'assets' / 'clips'))
TRAINING, HELD_OUT = CLIPS / 'train' / 'crystan-credits.ogg', CLIPS / 'heldout' / 'savino-palace.ogg'
STEPS = 300


def get_config(arg: str = '', *, steps: int = STEPS):
  """`tiny` on the clips in the box, for so few steps: nearly all of them train the envelope alone.

  arg: words as after a config file's colon: 'debug' shrinks the model so that the steps take seconds.
  """
  config = tiny.get_config(arg)
  config.data.root = str(CLIPS / 'train')
  config.train.steps = steps
  config.train.head_start = 0.9
  config.train.log_every = 20
  config.train.checkpoint_every = steps
  config.train.probe_every = 0
  return config


def model(path, arg: str = '', *, steps: int = STEPS) -> Codec:
  """The model at `path`, or in the box under that name; where there is none, a sketch is first trained there.

  The same call goes on with a sketch that was stopped or had fewer steps; no other model is ever changed.

  Args:
    path: snapshot, workdir or name; of a workdir to be made where there is none.
    arg, steps: of the sketch, as for `get_config`.

  Raises UserError: what is there is damaged, or the workdir cannot be made.
  """
  if _is_to_be_trained(path, arg, steps):
    from m2l2.train import train  # needs the extra `train`, which a finished model does not
    train(get_config(arg, steps=steps), path)
  return load(path)


def _is_to_be_trained(path, arg, steps):
  """Whether nothing is there, what is left of training stopped before its first step, or a sketch of fewer steps."""
  try:
    path = Path(locate(path))
  except UserError:
    return True
  if path.is_dir() and {entry.name for entry in path.iterdir()} <= {'checkpoints'}:
    return True
  try:
    run = json.loads((path / 'config.json').read_text(encoding='utf-8'))
    ours = run == json.loads(json.dumps(get_config(arg, steps=run['train']['steps']).to_dict()))
  except (OSError, ValueError, KeyError, TypeError):  # in the box, a bare snapshot or none at all: `load` will tell
    return False
  return ours and (not (path / 'snapshot').is_dir() or load_snapshot(path).step < steps)
