"""Published figures of accelerators: peaks, memory, links, by JAX's device_kind."""

import dataclasses

from m2l2.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device. (A TPU v2, v3 or 7x chip is two devices: the figures are of one.)

  Attributes:
    name: the common name, 'v5e'.
    device_kinds: what `jax.Device.device_kind` calls it.
    bf16_flops: peak FLOP/s of dense bfloat16 matrix products; None if the chip has no fast ones.
    f32_flops: the same for float32 at JAX's default precision: one bfloat16 pass on TPUs, TF32 on newer GPUs.
    hbm_bytes: memory.
    hbm_bytes_per_second: to and from that memory, together.
    matrix_unit: width of the matrix unit that contracted and output features are padded to.
    link_bytes_per_second: over all links to other chips (ICI, NVLink), one direction; None without links.
    platform: 'tpu' or 'gpu'.
    clock: Hz of a TPU's core, the unit of the compiler's cycles; None for GPUs.
  """
  name: str
  device_kinds: tuple[str, ...]
  bf16_flops: float | None
  f32_flops: float
  hbm_bytes: int
  hbm_bytes_per_second: float
  matrix_unit: int
  link_bytes_per_second: float | None
  platform: str
  clock: float | None = None

  def flops(self, dtype: str) -> float | None:
    """Peak FLOP/s of products of 'bfloat16' or 'float32'."""
    return {'bfloat16': self.bf16_flops, 'float32': self.f32_flops}[dtype]


def _tpu(name, kinds, flops, gib, bandwidth, unit, link, clock):
  return Chip(name, kinds, flops, flops, int(gib * GIB), bandwidth, unit, link, 'tpu', clock)


def _gpu(name, kinds, bf16, f32, gb, bandwidth, link=None):
  return Chip(name, kinds, bf16, f32, int(gb * 1e9), bandwidth, 16, link, 'gpu')


# No chip is given options of XLA. A larger scoped VMEM on v5p (xla_tpu_scoped_vmem_limit_kib=65472) makes a packed
# block of 64 channels cheaper and all else dearer, by the compiler's estimate of 8 chunks, forward and backward, on
# 30 Nov 2026 with the code of then: 3.39 -> 3.19 M cycles; a block of 128 channels 1.46 -> 1.55, a transformer of 12
# layers 22.6 -> 24.6. To try others: m2l2 plan ... --config.train.compiler_options=NAME=VALUE.
CHIPS = (
    # cloud.google.com/tpu/docs, one page a version. Links: half of the sum of both directions; none is given there up
    # to v4 (the paper on v4 has six links of 50 GB/s). 'GB' of memory are GiB, less what the runtime keeps (v5p: 96).
    # Clocks: up to v4 the papers on them, v5e "How to Scale Your Model" (page on TPUs); these and v5p's are the peak
    # over what the pages' matrix units of 128 x 128 do in a cycle. Those of v6e and 7x are that too, if their units of
    # 256 x 256 do twice as much in a cycle, as the compiler has them do: it estimates a product of 8192 at 369 k and
    # 422 k FLOP a cycle, where once would be 262 k.
    _tpu('v2', ('TPU v2',), 23e12, 8, 350e9, 128, None, 700e6),
    _tpu('v3', ('TPU v3',), 61.5e12, 16, 450e9, 128, None, 940e6),
    _tpu('v4', ('TPU v4',), 275e12, 32, 1200e9, 128, 300e9, 1050e6),
    _tpu('v5e', ('TPU v5 lite', 'TPU v5e'), 197e12, 16, 819e9, 128, 200e9, 1500e6),
    _tpu('v5p', ('TPU v5', 'TPU v5p'), 459e12, 95, 2765e9, 128, 600e9, 1750e6),
    _tpu('v6e', ('TPU v6 lite', 'TPU v6e'), 918e12, 32, 1638e9, 256, 400e9, 1750e6),
    _tpu('7x', ('TPU7x',), 1153.5e12, 96, 3690e9, 256, 300e9, 2200e6),
    # NVIDIA's data sheets, without sparsity. Volta and Turing multiply float16 fast, but not bfloat16.
    _gpu('V100-16', ('Tesla V100-SXM2-16GB',), None, 15.7e12, 16, 900e9, 150e9),
    _gpu('V100-32', ('Tesla V100-SXM2-32GB', 'Tesla V100-SXM3-32GB'), None, 15.7e12, 32, 900e9, 150e9),
    _gpu('T4', ('Tesla T4',), None, 8.1e12, 16, 320e9),
    _gpu('A10', ('NVIDIA A10',), 125e12, 62.5e12, 24, 600e9),
    _gpu('A10G', ('NVIDIA A10G',), 70e12, 35e12, 24, 600e9),
    _gpu('A100-40', ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-PCIE-40GB'), 312e12, 156e12, 40, 1555e9, 300e9),
    _gpu('A100-80', ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100 80GB PCIe'), 312e12, 156e12, 80, 2039e9, 300e9),
    _gpu('L4', ('NVIDIA L4',), 121e12, 60e12, 24, 300e9),
    _gpu('L40S', ('NVIDIA L40S',), 362e12, 183e12, 48, 864e9),
    _gpu('H100', ('NVIDIA H100 80GB HBM3',), 989e12, 494.5e12, 80, 3350e9, 450e9),
    _gpu('H100-PCIe', ('NVIDIA H100 PCIe',), 756e12, 378e12, 80, 2000e9, 300e9),
    _gpu('H200', ('NVIDIA H200',), 989e12, 494.5e12, 141, 4800e9, 450e9),
    _gpu('B200', ('NVIDIA B200',), 2250e12, 1125e12, 180, 8000e9, 900e9),
)
BY_NAME = {chip.name: chip for chip in CHIPS}


def find_chip(device_kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`; None for one that is not in the table (every CPU)."""
  return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def compiler_options(asked: str) -> dict[str, str]:
  """What XLA is told: 'NAME=VALUE,NAME=VALUE' of config.train.compiler_options. Raises UserError: other text."""
  options = {}
  for part in filter(None, asked.split(',')):
    name, _, value = (text.strip() for text in part.partition('='))
    if not name or not value:
      raise UserError(f'train.compiler_options={asked!r}: it takes NAME=VALUE, with commas between them')
    options[name] = value
  return options
