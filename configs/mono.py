"""Music2Latent2, mono, as the paper trains it: `base` under its own name, 147.5 M parameters.

    m2l2 train --config=configs/mono.py --config.data.root=MUSIC --workdir=runs/mono

Expected cost: 58.9 TFLOP a step of 16 pairs, as `base`; 2.7 days at a sustained 200 TFLOP/s. Counted, not run.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  config.model.channels = 1
  return base.finish(config, arg)
