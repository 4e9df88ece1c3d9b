"""For pods: `base` behind a patch of 2 x 2, 147.1 M parameters, and a recipe for batches of a thousand; not yet run.

    m2l2 train --config=configs/pod.py --config.data.root=gs://BUCKET/music --workdir=gs://BUCKET/runs/pod

Expected cost: 3028 TFLOP a step of 1024 pairs, 0.80 of what `base` costs a pair. The recipe of `base` is for a batch of
16; by config.scaling it becomes 100,000 steps here, 2,000 of them warm-up to a rate of 8e-4: 102 M crops, 8 times the
paper's, or 42,000 hours of sound. With less than some 2,000 hours of music it will see all of it twenty times.

                 a step at least    100,000 steps at least    at three times that
    v5e-256           68 ms             480 chip-hours         1,450 chip-hours
    v5p-256           29 ms             210 chip-hours           620 chip-hours

At least: FLOPs as executed and padded to the matrix unit, at the chips' peaks: the compute bound of `m2l2 plan` with
--topology=v5e:16x16 and v5p:4x8x8. Three times: what the TPU's compiler estimated for `base` on v5p. Counted, not run;
the plan itself has not been compiled, so memory and links are not in these figures.
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
