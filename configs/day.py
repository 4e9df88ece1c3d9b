"""For one GPU and a day: `base` at three quarters of its width, 90.1 M parameters, mono 44.1 kHz.

    m2l2 train --config=configs/day.py --config.data.root=MUSIC --workdir=runs/day

Against `base`: 360,000 steps instead of 800,000 (the last ones twice as long, see consistency.step_exponent), the
latents are also tokens of the denoiser, and what the ladder found to make them matter early: the flow's c_skip, linear
paths to them and back, a head start of 3,600 steps on magnitudes (launch/research/learning.md). Give it 200 hours of
music or more; with less it overfits.

Expected cost: 28.1 TFLOP a step of 16 pairs, 10.1 EFLOP in all. Expected time: 22 hours on an A100 at 40 % of its peak
(computed; not run).
Expected quality: unknown. Look at the log while it trains, and stop it where it does not learn: by step 30,000
probe_ema/coherence should be above .35 (probe_ema/coherence_source is that of the music) and probe_ema/swap above .2;
latent/saturated should always be below .05.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  config.model.widths = (48, 96, 192, 384)
  config.variants.denoiser.latents = True
  config.variants.flow_skip.on = True
  config.variants.latent_norm.on = True
  config.variants.shortcut.width = 8
  config.variants.head_start.update(share=0.01, task='magnitudes')
  config.consistency.step_exponent = 2.0
  config.train.steps = 360_000
  return base.finish(config, arg)
