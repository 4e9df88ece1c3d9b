"""CoDiCodec (Pasini, Lattner, Fazekas, 2025): stereo, 128x, continuous latents or tokens, 147.2 M parameters.

    m2l2 import-codicodec codicodec.pt runs/codicodec     # its published weights
    m2l2 train --config=configs/codicodec.py --config.data.root=MUSIC --workdir=runs/codicodec

The network is that of the published weights. The training recipe is what its paper tells: 2 million steps of 16 pairs,
half of the samples sums of two crops, and the noise levels of its ancestor's index grid (whose code calls that
log-normal).

Expected cost: 39.4 TFLOP a step of 16 pairs, 79 EFLOP in all. Expected time: 7.3 days on an A100 at 40 % of its peak
(computed; not run).
Expected quality: that of the published weights, which m2l2 runs (m2l2/interop/README.md). Nothing was trained here.
"""

from m2l2.configs import base


def get_config(arg=''):
  config = base.get_config()
  model = config.model
  model.channels = 2
  model.hop, model.frames = 1024, 32
  model.edges = 'none'
  model.transform = 'component'
  model.strides = ((2, 2), (4, 1), (2, 2))
  model.num_latents, model.latent_dim = 128, 4

  config.variants.fsq.on = True
  config.variants.denoiser.update(latents=True, registers=8)
  config.variants.variance_renoise.on = True
  config.consistency.step_exponent = 2.0
  # Its decoding: the chunk before at sigma(0.4), two steps a chunk and no refinement; five steps in parallel.
  config.consistency.sigma_cond = 0.9654169263318955
  config.consistency.refine = False
  config.consistency.steps = 2
  config.variants.staggered.steps = 5

  config.train.steps = 2_000_000
  config.data.mix = 0.5
  return base.finish(config, arg)
