"""Music2Latent2, stereo: 128x fewer numbers, 147.5 M parameters.

    m2l2 train --config=configs/stereo.py --config.data.root=MUSIC --workdir=runs/stereo

Expected cost: 58.9 TFLOP a step of 16 pairs, as `base`; 2.7 days at a sustained 200 TFLOP/s. Counted, not run.

Stereo runs are known to collapse near the end of warm-up (every latent at +-1). With latent_norm each embedding comes
to the tanh with RMS 0.4, whatever its length, so they cannot; the longer warm-up and lower rate are ours, too. Not yet
tried at length: see README for what was.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  config.model.channels = 2
  config.model.latent_norm = True
  config.train.learning_rate = 5e-5
  config.train.warmup_steps = 20_000
  return base.finish(config, arg)
