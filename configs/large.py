"""For pods: 395 M parameters, mono (append :stereo for stereo). The paper's recipe on a larger network.

    m2l2 train --config=configs/large.py --config.train.batch_size=256 --config.data.root=MUSIC --workdir=runs/large

Expected cost: 117 TFLOP a step of 16 pairs, 2.4 times what `base` costs. Expected time, for 800,000 steps of 256 pairs:
9 hours on 256 chips of TPU v5p at 40 % of their peak (computed; not run). Of `base` the compiler expects 20 % (`m2l2
plan`).
Expected quality: unknown, no model of this size was trained.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  config.model.widths = (96, 192, 384, 768)
  config.model.layers = 16
  config.model.remat = 'blocks'
  return base.finish(config, arg)
