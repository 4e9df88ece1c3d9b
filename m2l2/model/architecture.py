"""Every size of the network, and its parts made to these sizes: the seam at which variants/ put others."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from m2l2.kernels.chunk_causal import IMPLEMENTATIONS
from m2l2.model.decoder import Decoder
from m2l2.model.denoiser import Denoiser
from m2l2.model.encoder import Encoder
from m2l2.model.layers import groups
from m2l2.model.patchify import DePatchifier, OutputHead, Patchifier
from m2l2.model.remat import REMATS
from m2l2.model.transformer import Transformer

DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Architecture:
  """The paper's network: its sizes, and how it runs. Its methods make the parts; variants/ override them.

  Attributes:
    channels, bins, frames: audio channels, frequency bins and frames of a chunk.
    stem: (F, T) patch folded into channels before the first conv; (1, 1) is the paper's.
    widths, blocks: channels and conv blocks of each level; the last width is the transformers' D.
    strides: (F, T) of each resampler, one fewer than levels.
    layers, head_dim, mlp_mult: of all three transformers.
    num_latents, latent_dim: K summary embeddings of d numbers a chunk.
    registers: extra tokens of encoder and decoder.
    chunks: chunks that the denoiser sees at once.
    cond_dim: width of the noise embedding.
    remat: what of each layer and conv block the backward pass computes again: 'none', all but its 'products', the whole
      'blocks'; 'full': of encoder, decoder and denoiser too nothing but their inputs is kept.
    attention: implementation of chunk-causal attention, see kernels/chunk_causal.py.
    dtype: of activations; parameters are float32.
  """
  channels: int
  bins: int
  frames: int
  stem: tuple
  widths: tuple
  blocks: tuple
  strides: tuple
  layers: int
  head_dim: int
  mlp_mult: int
  num_latents: int
  latent_dim: int
  registers: int
  chunks: int
  cond_dim: int
  remat: str
  attention: str
  dtype: str

  def __post_init__(self):
    for field in ('channels', 'bins', 'frames', 'stem', 'widths', 'blocks', 'strides', 'layers', 'head_dim',
                  'mlp_mult', 'num_latents', 'latent_dim', 'chunks'):
      if any(size < 1 for size in jax.tree.leaves(getattr(self, field))):
        raise ValueError(f'model.{field} is {getattr(self, field)}; every size must be at least 1')
    if self.registers < 0:
      raise ValueError(f'model.registers is {self.registers}; it cannot be negative')
    if self.cond_dim < 4 or self.cond_dim % 2:
      raise ValueError(f'model.cond_dim is {self.cond_dim}; sines and cosines take an even number, at least 4')
    if not len(self.widths) == len(self.blocks) == len(self.strides) + 1:
      raise ValueError('model.widths and model.blocks need one entry a level, model.strides one fewer')
    if self.dim % self.head_dim:
      raise ValueError(f'model.head_dim {self.head_dim} must divide the last of model.widths {self.dim}')
    if any(b % a for a, b in zip(self.widths, self.widths[1:])):
      raise ValueError(f'each of model.widths {self.widths} must be a multiple of the one before')
    if any(width % groups(width) for width in self.widths):
      raise ValueError(f'each of model.widths {self.widths} must be a multiple of its groups, width / 4 and at most 32')
    for field, choices in (('attention', IMPLEMENTATIONS), ('dtype', DTYPES), ('remat', REMATS)):
      if getattr(self, field) not in choices:
        raise ValueError(f'model.{field} is {getattr(self, field)!r}; choose from {choices}')
    _ = self.grid  # raises where the strides do not divide

  # Sizes that follow.

  @property
  def dim(self) -> int:
    """Width of the tokens."""
    return self.widths[-1]

  @property
  def rows(self) -> int:
    """Rows of the finest map, each with a gain of its own."""
    return self.bins // self.stem[0]

  @property
  def grid(self) -> tuple:
    """(F, T) of the deepest map."""
    total = [self.stem[i] * math.prod(stride[i] for stride in self.strides) for i in (0, 1)]
    if self.bins % total[0] or self.frames % total[1]:
      raise ValueError(f'stem and strides reduce by {total[0]} x {total[1]}, which does not divide '
                       f'{self.bins} x {self.frames}')
    return self.bins // total[0], self.frames // total[1]

  @property
  def sequence(self) -> tuple:
    """(tokens of the map, embeddings) that encoder and decoder attend to at once."""
    return math.prod(self.grid), self.num_latents

  @property
  def cramped(self) -> list:
    """(level, width, numbers of a patch) of each level with fewer channels than the patch it stands for has numbers.

    What does not fit into the tokens cannot be followed over more than the few frames that convolutions see: a partial
    breaks off. The paper's model has room on each level.
    """
    levels, numbers = [], 2 * self.channels * math.prod(self.stem)
    for level, width in enumerate(self.widths):
      numbers *= math.prod(self.strides[level - 1]) if level else 1
      if width < numbers:
        levels.append((level, width, numbers))
    return levels

  @property
  def encoder_channels(self) -> int:
    return 2 * self.channels

  @property
  def denoiser_channels(self) -> int:
    return 2 * self.channels

  @property
  def denoiser_extra(self) -> int:
    """Tokens of the denoiser beside the patches'."""
    return 0

  # Parts.

  @property
  def ladder(self) -> dict:
    return dict(widths=self.widths, blocks=self.blocks, strides=self.strides, remat=self.remat,
                dtype=jnp.dtype(self.dtype))

  def patchifier(self, in_channels, **options):
    return Patchifier(in_channels, stem=self.stem, **self.ladder, **options)

  def depatchifier(self, **options):
    return DePatchifier(grid=self.grid, **self.ladder, **options)

  def output_head(self, out_channels, **options):
    return OutputHead(self.widths[0], out_channels, stem=self.stem, dtype=jnp.dtype(self.dtype), **options)

  def transformer(self, tokens, **options):
    return Transformer(self.dim, layers=self.layers, heads=self.dim // self.head_dim, mlp_mult=self.mlp_mult,
                       tokens=tokens, remat=self.remat, impl=self.attention, **options)

  def encoder(self, *, rngs):
    return Encoder(self, rngs=rngs)

  def decoder(self, *, rngs):
    return Decoder(self, rngs=rngs)

  def denoiser(self, *, rngs):
    return Denoiser(self, rngs=rngs)

  def make_bottleneck(self):
    return Tanh()

  def features(self, decoded, z):
    """What the denoiser is given, of the decoder's output (None where there is no decoder) and the latents."""
    return decoded


@dataclasses.dataclass(frozen=True)
class Tanh:
  """The bottleneck: z = tanh(pre)."""

  def __call__(self, pre, *, keys=None):
    """pre [B, ...]; `keys` [B] is taken and ignored, so that all bottlenecks are called alike."""
    return jnp.tanh(pre)
