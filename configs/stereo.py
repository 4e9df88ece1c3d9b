"""Music2Latent2 in stereo, 128x fewer numbers: the same as `base:stereo`. 147.5 M parameters.

    m2l2 train --config=configs/stereo.py --config.data.root=MUSIC --workdir=runs/stereo

Stereo runs are known to collapse near the end of warm-up (every latent at +-1). `base.stereo` says what is changed
against that.

Expected cost: 49.0 TFLOP a step of 16 pairs, as `base`. Expected time: 3.6 days on an A100 at 40 % of its peak
(computed; not run).
Expected quality: unknown. A small stereo run of 600 steps did not collapse (launch/research/learning.md).
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  base.stereo(config)
  return base.finish(config, arg)
