"""The music in the box: excerpts of 6 s, whose composers and licences assets/clips/ATTRIBUTION.md names, and a clip for
the model `piano`."""

from importlib import resources
from pathlib import Path

CLIPS = Path(str(resources.files('m2l2') / 'assets' / 'clips'))
TRAINING = CLIPS / 'train' / 'crystan-credits.ogg'
HELD_OUT = CLIPS / 'heldout' / 'savino-palace.ogg'  # of a game by which no model here was trained or chosen
PIANO = CLIPS.parent / 'models' / 'piano' / 'prelude.ogg'  # four bars of Bach's prelude in C, rendered; its MODEL.md
