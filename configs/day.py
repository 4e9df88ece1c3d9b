"""For one GPU and a day: the paper's shape at three quarters of its width, 85.9 M parameters, mono 44.1 kHz.

    m2l2 train --config=configs/day.py --config.data.root=MUSIC --workdir=runs/day

What `base` would need 5 days for, in one: fewer steps (their last ones twice as long, see consistency.step_exponent),
and the latents are tokens of the denoiser too. Give it 200 hours of music or more; with less it remembers.

Expected cost: 33.7 TFLOP a step of 16 pairs, 10.1 EFLOP in all: a day at a sustained 117 TFLOP/s. Counted,
not run.

Look at the log while it runs, and stop it where it does not learn: by step 30,000 probe_ema/coherence should be beyond
.35 (probe_ema/coherence_source is what the music has) and probe_ema/swap beyond .2, latent/saturated always below .05.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  config.model.widths = (48, 96, 192, 384)
  config.model.latents_in_denoiser = True
  config.consistency.step_exponent = 2.0
  config.train.steps = 300_000
  return base.finish(config, arg)
