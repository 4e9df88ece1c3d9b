"""For pods: `base` behind a patch of 2 x 2, 147.1 M parameters, and a recipe for batches of a thousand; not yet run.

    m2l2 train --config=configs/pod.py --config.data.root=gs://BUCKET/music --workdir=gs://BUCKET/runs/pod

Expected cost: TBD
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  model = config.model
  # No level at full resolution, where a third of base's step goes: 2 x 2 cells are folded into 128 channels at once,
  # and its level gets the block that is saved.
  model.stem = (2, 2)
  model.widths = (128, 256, 512)
  model.blocks = (4, 3, 1)
  model.strides = ((4, 2), (2, 2))

  config.train.batch_size = 1024
  config.scaling.batch = 16  # of which all of base's numbers are; see there for the rules
  config.scaling.ema_half_life = 110_898
  return base.finish(config, arg)
