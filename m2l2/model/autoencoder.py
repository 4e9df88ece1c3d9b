"""Encoder, bottleneck, decoder and denoiser as one module: what a checkpoint holds.

The functions at the end run it on a plain nested dict of parameters, which is all that training, Codec and
checkpoints ever see.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.kernels.chunk_causal import IMPLEMENTATIONS
from m2l2.model.bottleneck import FSQ, Tanh
from m2l2.model.decoder import Decoder
from m2l2.model.denoiser import Denoiser, token_grid
from m2l2.model.encoder import Encoder
from m2l2.model.layers import REMATS, draw_all, groups, traced

DTYPES = ('float32', 'bfloat16')
TILES = (0, 128, 256)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Every choice of the network (config.model without the representation).

  Attributes:
    channels, bins, frames: audio channels, frequency bins and frames of a chunk.
    stem: (F, T) patch folded into channels before the first conv; (1, 1) is the paper's.
    widths, blocks: channels and conv blocks of each level; the last width is the transformers' D.
    strides: (F, T) of each resampler, one fewer than levels.
    layers, head_dim, mlp_mult: of all three transformers.
    num_latents, latent_dim: K summary embeddings of d numbers a chunk.
    registers: extra tokens of encoder and decoder; denoiser_registers: of the denoiser.
    chunks: chunks that the denoiser sees at once.
    cond_dim: width of the noise embedding.
    bottleneck: 'tanh' or 'fsq' (then fsq_levels, fsq_dropout).
    latents_in_denoiser: the embeddings are also tokens of the denoiser's transformer.
    magnitude_input: log-magnitudes as further input channels of the encoder.
    linear_sketch: (bands, stretches of frames) of a linear autoencoder of the log-magnitudes beside the networks, see
      `envelope.band_edges`; () for none. It needs `envelope`.
    latent_norm: each embedding enters the bottleneck with RMS 0.4, so that it can hardly saturate.
    shortcut: linear paths tokens -> latents and latents -> tokens beside the transformers; shortcut_width: numbers a
      token on these, all mixed with all; 0: each latent is one pooling of the tokens.
    envelope: the decoder also predicts log-magnitudes; they are further input channels of the denoiser.
    feature_norm: cross-connection features are scaled to unit mean square.
    embeddings: 'summary': each may say anything about the whole chunk; 'local': in order, each belongs to a slot of the
      chunk's frames, as in an ordinary autoencoder.
    cross_connections: the decoder's maps enter the denoiser's patchifier; without them (and without the envelope) there
      is no decoder, and only latents_in_denoiser tells the denoiser anything.
    remat: what of each layer and conv block the backward pass computes again: 'none', all but its 'products', the whole
      'blocks'; 'full': of encoder, decoder and denoiser too nothing but their inputs is kept.
    tile: maps narrower than this are packed, frames into channels, see model/packing.py; 0: never.
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
  denoiser_registers: int
  chunks: int
  cond_dim: int
  bottleneck: str
  fsq_levels: int
  fsq_dropout: float
  latents_in_denoiser: bool
  magnitude_input: bool
  shortcut: bool
  shortcut_width: int
  linear_sketch: tuple
  latent_norm: bool
  envelope: bool
  feature_norm: bool
  embeddings: str
  cross_connections: bool
  remat: str
  tile: int
  attention: str
  dtype: str

  def __post_init__(self):
    for field in ('channels', 'bins', 'frames', 'stem', 'widths', 'blocks', 'strides', 'layers', 'head_dim',
                  'mlp_mult', 'num_latents', 'latent_dim', 'chunks'):
      if any(size < 1 for size in jax.tree.leaves(getattr(self, field))):
        raise ValueError(f'model.{field} is {getattr(self, field)}; every size must be at least 1')
    if min(self.registers, self.denoiser_registers, self.shortcut_width) < 0:
      raise ValueError('model.registers, model.denoiser_registers and model.shortcut_width cannot be negative')
    if self.cond_dim < 4 or self.cond_dim % 2:
      raise ValueError(f'model.cond_dim is {self.cond_dim}; sines and cosines take an even number, at least 4')
    if not len(self.widths) == len(self.blocks) == len(self.strides) + 1:
      raise ValueError('model.widths and model.blocks need one entry a level, model.strides one fewer')
    if self.widths[-1] % self.head_dim:
      raise ValueError(f'model.head_dim {self.head_dim} must divide the last of model.widths {self.widths[-1]}')
    if any(b % a for a, b in zip(self.widths, self.widths[1:])):
      raise ValueError(f'each of model.widths {self.widths} must be a multiple of the one before')
    if any(width % groups(width) for width in self.widths):
      raise ValueError(f'each of model.widths {self.widths} must be a multiple of its groups, width / 4 and at most 32')
    if self.linear_sketch and not self.envelope:
      raise ValueError('model.linear_sketch needs model.envelope, to which it is added')
    if self.linear_sketch and self.embeddings != 'summary':
      raise ValueError("model.linear_sketch goes with model.embeddings='summary' alone")
    if self.linear_sketch and not (len(self.linear_sketch) == 2 and 1 <= self.linear_sketch[0] <= self.bins
                                   and self.linear_sketch[1] > 0 and self.frames % self.linear_sketch[1] == 0):
      raise ValueError(f'model.linear_sketch is {self.linear_sketch}; it is (bands, stretches), at most {self.bins} '
                       f'bands and a divisor of the {self.frames} frames')
    if self.attention not in IMPLEMENTATIONS:
      raise ValueError(f'model.attention is {self.attention!r}; choose from {IMPLEMENTATIONS}')
    if self.tile not in TILES:
      raise ValueError(f"model.tile is {self.tile!r}; choose from ('auto', {', '.join(map(str, TILES))})")
    if self.dtype not in DTYPES:
      raise ValueError(f'model.dtype is {self.dtype!r}; choose from {DTYPES}')
    if self.remat not in REMATS:
      raise ValueError(f'model.remat is {self.remat!r}; choose from {REMATS}')
    if self.bottleneck not in ('tanh', 'fsq'):
      raise ValueError(f"model.bottleneck is {self.bottleneck!r}; choose 'tanh' or 'fsq'")
    if self.embeddings not in ('summary', 'local'):
      raise ValueError(f"model.embeddings is {self.embeddings!r}; choose 'summary' or 'local'")
    if not self.cross_connections and not self.latents_in_denoiser:
      raise ValueError('without model.cross_connections the latents reach the denoiser only by '
                       'model.latents_in_denoiser=True')
    # These raise: for bad fsq_levels or fsq_dropout; where strides do not divide.
    _ = self.make_bottleneck(), self.grid
    if self.embeddings == 'local' and self.slots == 1:
      raise ValueError(f"model.embeddings='local' needs model.num_latents, {self.num_latents}, and the {self.grid[1]} "
                       'frames of the token grid to have a common factor')

  @property
  def grid(self):
    return token_grid(self.bins, self.frames, self.stem, self.strides)

  @property
  def slots(self) -> int:
    """Parts of a chunk's frames that have embeddings of their own: 1 for summary embeddings."""
    return 1 if self.embeddings == 'summary' else math.gcd(self.num_latents, self.grid[1])

  @property
  def cramped(self) -> list:
    """(level, width, numbers of a patch) of each level with fewer channels than the patch it stands for has numbers.

    What does not fit into the tokens cannot be followed over more than the few frames that convolutions see: a partial
    breaks off. The paper's model has room on each level.
    """
    found, numbers = [], 2 * self.channels * math.prod(self.stem)
    for level, width in enumerate(self.widths):
      numbers *= math.prod(self.strides[level - 1]) if level else 1
      if width < numbers:
        found.append((level, width, numbers))
    return found

  @property
  def has_decoder(self) -> bool:
    return self.cross_connections or self.envelope

  def make_bottleneck(self):
    return Tanh() if self.bottleneck == 'tanh' else FSQ(levels=self.fsq_levels, dropout=self.fsq_dropout)


class Autoencoder(nnx.Module):
  """The three networks that share a config; see the functions of `Network` for what they compute."""

  def __init__(self, arch: Architecture, *, rngs):
    grid = arch.grid
    sketch_grid = (*arch.linear_sketch, arch.channels) if arch.linear_sketch else None
    transformer = dict(layers=arch.layers, heads=arch.widths[-1] // arch.head_dim, mlp_mult=arch.mlp_mult,
                       impl=arch.attention)
    shared = dict(channels=arch.channels, bins=arch.bins, stem=arch.stem, grid=grid, widths=arch.widths,
                  blocks=arch.blocks, strides=arch.strides, transformer=transformer, num_latents=arch.num_latents,
                  latent_dim=arch.latent_dim, remat=arch.remat, tile=arch.tile, dtype=jnp.dtype(arch.dtype), rngs=rngs)
    chunkwise = dict(slots=arch.slots, registers=arch.registers, shortcut=arch.shortcut,
                     shortcut_width=arch.shortcut_width, sketch_grid=sketch_grid, **shared)
    self.encoder = Encoder(magnitude_input=arch.magnitude_input, latent_norm=arch.latent_norm, **chunkwise)
    self.decoder = (
        Decoder(envelope=arch.envelope, feature_norm=arch.feature_norm, **chunkwise) if arch.has_decoder else None)
    self.denoiser = Denoiser(registers=arch.denoiser_registers, chunks=arch.chunks,
                             latents=arch.latents_in_denoiser, envelope_input=arch.envelope, cond_dim=arch.cond_dim,
                             **shared)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """The autoencoder as pure functions of `params`, a nested dict of float32 arrays.

  init(key) -> params
  encode(params, spec [B, S, F, T, 2C]) -> [B, S, L, Z] float32, before the bottleneck
  decode(params, z [B, S, L, Z]) -> features: {'maps'?: (...), 'z'?, 'log_magnitude'?}, every leaf [B, S, ...]
  denoise(params, x [B, S, F, T, 2C], sigma [B, S], features) -> raw output [B, S, F, T, 2C] float32

  shapes: of params, as jax.ShapeDtypeStruct: what tracing `init` would tell.
  """
  arch: Architecture
  init: Callable
  encode: Callable
  decode: Callable
  denoise: Callable
  logical_axes: dict
  init_names: dict
  shapes: dict


@functools.lru_cache(maxsize=8)  # equal networks are one: what was compiled for it serves again
def make_network(arch: Architecture) -> Network:
  """Shapes are traced once; nothing is allocated."""
  graphdef, shapes, inits, axes = traced(lambda: Autoencoder(arch, rngs=nnx.Rngs(params=jax.random.key(0))))

  def part(name):
    def run(params, *args):
      module = nnx.merge(graphdef, params)
      with jax.named_scope(name):
        return getattr(module, name)(*args)
    return jax.checkpoint(run) if arch.remat == 'full' else run

  decoder = part('decoder')

  def decode(params, z):
    features = decoder(params, z) if arch.has_decoder else {}
    if not arch.cross_connections:
      features.pop('maps', None)
    return {**features, 'z': z} if arch.latents_in_denoiser else features

  return Network(
      arch=arch,
      init=lambda key: draw_all(key, shapes, inits),
      encode=part('encoder'), decode=decode, denoise=part('denoiser'),
      logical_axes=axes, init_names=jax.tree.map(lambda init: init.name, inits), shapes=shapes)
