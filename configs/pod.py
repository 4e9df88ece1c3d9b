"""For pods: `base` behind a patch of 2 x 2, 147.1 M parameters, and a recipe for batches of a thousand; not yet run.

    m2l2 train --config=configs/pod.py --config.data.root=gs://BUCKET/music --workdir=gs://BUCKET/runs/pod

Expected cost: 2551 TFLOP a step of 1024 pairs, .81 of the cost of `base` a pair. By config.scaling the recipe of
`base`, written for a batch of 16, becomes 100,000 steps with 2,000 of warm-up to a rate of 8e-4. They take 102 M crops,
8 times the paper's, or 42,000 hours of sound; with less than some 2,000 hours of music each is seen twenty times.
Expected time: 85 ms a step on 256 chips of TPU v5p (v5p-512) as its compiler estimates, 600 chip-hours for the 100,000
steps; 29 ms, 210 chip-hours at least (the bound by memory of `m2l2 plan --config=configs/pod.py --topology=v5p:4x8x8`).
On v5e-256 (`--topology=v5e:16x16`) 186 ms, 1,320 chip-hours; 66 ms, 470 chip-hours at least (by compute). Computed, not
run.
Expected quality: unknown; no model of this family has been trained at such a batch. On rung T1 of the ladder such a
patch loses nothing (launch/research/learning.md).
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
