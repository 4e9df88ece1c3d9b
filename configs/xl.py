"""For large pods: 988 M parameters, mono (append :stereo for stereo). The paper's recipe on a larger network.

    m2l2 train --config=configs/xl.py --config.train.batch_size=512 --config.data.root=MUSIC --workdir=runs/xl

Expected cost: 238 TFLOP a step of 16 pairs, 4.9 times what `base` costs. Expected time, for 800,000 steps of 512 pairs:
36 hours on 256 chips of TPU v5p at 40 % of their peak (computed; not run). Of `base` the compiler expects 20 % (`m2l2
plan`).
Expected quality: unknown, no model of this size was trained.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  config.model.widths = (128, 256, 512, 1024)
  config.model.layers = 24
  config.model.remat = 'blocks'
  config.model.cond_dim = 1024
  return base.finish(config, arg)
