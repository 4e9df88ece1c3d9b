"""For a CPU and two hours: `tiny` at 22.05 kHz, the recipe of the model in the box. 14.7 M parameters, mono.

    m2l2 prepare --input=data/music/train --output=data/prepared --validation-fraction=0.08
    python launch/research/pca_start.py --config=configs/tiny22.py --config.data.root=data/prepared \\
      --output=runs/start --crops=20000
    m2l2 train --config=configs/tiny22.py --config.data.root=data/prepared --config.train.init_from=runs/start \\
      --workdir=runs/tiny22

Windows are as long as the paper's in seconds, chunks are twice as long (1.49 s), so a second of music costs half of
`tiny`'s and has half as many numbers: 344.5. Patches are half as high as `tiny`'s: those of 8 x 4 bins hold more
numbers than their 48 channels, and training added nothing to the linear start then.

Expected cost: 48.8 GFLOP a step of 2 pairs, 0.29 PFLOP in all; 6,000 steps see 10 hours of audio in 1 h 10 min on two
CPU cores or 1 h 50 min on one.
Expected result, on tracks put aside: FD 248 of the start comes to 200, ratio 0.52 stays.
"""

from m2l2.configs import base, tiny


def get_config(arg=''):
  config = tiny.get_config()
  model = config.model
  model.native_rates = (22050,)
  model.window = 1024
  model.hop = 256
  model.bins = 512
  model.frames = 128
  model.stem = (4, 4)
  model.shortcut_width = 16
  config.consistency.noise = 'signal'
  config.consistency.refine = False    # two steps did not beat one on the tracks put aside
  model.linear_sketch = (128, 64)
  model.latent_norm = False            # the sketch begins with latents of RMS 0.4

  train = config.train
  # The envelope is there from the start: all steps are full ones. They begin as plain denoising.
  train.steps = 6000
  train.head_start = 0.0
  train.envelope_weight = 30.0
  train.envelope_bands = 192
  train.nested = 0.25
  config.consistency.easy = 0.3
  train.learning_rate = 1e-3
  train.ema_decay = 0.999
  train.log_every = 100
  train.probe_every = 500
  train.checkpoint_every = 500
  return base.finish(config, arg)
