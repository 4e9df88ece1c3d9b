"""The paper's network with what departs from it: `Variant` makes the parts, which call on the other files here.

With every departure off, parameters and results are those of m2l2.model.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from m2l2.model.architecture import Architecture
from m2l2.model.decoder import Decoder
from m2l2.model.denoiser import Denoiser
from m2l2.model.encoder import Encoder
from m2l2.model.layers import Linear
from m2l2.model.parameters import normal, param
from m2l2.variants import linear_paths, packing
from m2l2.variants.envelope import EnvelopeHead, EnvelopeSketch, LatentSketch, log_magnitude
from m2l2.variants.fsq import FSQ
from m2l2.variants.slots import join_slots, split_slots

TILES = (0, 128, 256)


@dataclasses.dataclass(frozen=True)
class Variant(Architecture):
  """An Architecture and its departures, each off by default.

  Attributes:
    fsq, fsq_levels, fsq_dropout: quantised latents in place of tanh's, see fsq.py.
    denoiser_latents: the embeddings are also tokens of the denoiser's transformer, as in CoDiCodec.
    denoiser_registers: further tokens of it.
    magnitude_input: log-magnitudes as further input channels of the encoder.
    shortcut_width, latent_norm, feature_norm: see linear_paths.py. shortcut_width: numbers a token on the linear
      paths; 0: there are none.
    envelope: the decoder also predicts log-magnitudes, which are further input channels of the denoiser: envelope.py.
    sketch_cells: (bands, stretches of frames) of a linear autoencoder of the log-magnitudes, see there; () for none.
    local_embeddings: each embedding sees its own slot of frames alone, see slots.py.
    no_cross_connections: the decoder's maps do not enter the denoiser's patchifier; without the envelope there is no
      decoder then, and only denoiser_latents tells the denoiser anything.
    packing_tile: maps narrower than this are packed, frames into channels, see packing.py; 0: never.
  """
  fsq: bool = False
  fsq_levels: int = 11
  fsq_dropout: float = 0.75
  denoiser_latents: bool = False
  denoiser_registers: int = 0
  magnitude_input: bool = False
  shortcut_width: int = 0
  sketch_cells: tuple = ()
  latent_norm: bool = False
  envelope: bool = False
  feature_norm: bool = False
  local_embeddings: bool = False
  no_cross_connections: bool = False
  packing_tile: int = 0

  def __post_init__(self):
    super().__post_init__()
    if min(self.denoiser_registers, self.shortcut_width) < 0:
      raise ValueError('variants.denoiser.registers and variants.shortcut.width cannot be negative')
    if self.sketch_cells and not self.envelope:
      raise ValueError('variants.sketch needs variants.envelope.on, to which it is added')
    if self.sketch_cells and self.local_embeddings:
      raise ValueError('variants.sketch does not go with variants.local_embeddings')
    if self.sketch_cells and not (len(self.sketch_cells) == 2 and 1 <= self.sketch_cells[0] <= self.bins
                                  and self.sketch_cells[1] > 0 and self.frames % self.sketch_cells[1] == 0):
      raise ValueError(f'variants.sketch.cells is {self.sketch_cells}; it is (bands, stretches), at most {self.bins} '
                       f'bands and a divisor of the {self.frames} frames')
    if self.packing_tile not in TILES:
      raise ValueError(f"variants.packing.tile is {self.packing_tile!r}; choose from ('auto', "
                       f"{', '.join(map(str, TILES))})")
    if self.no_cross_connections and not self.denoiser_latents:
      raise ValueError('variants.no_cross_connections needs variants.denoiser.latents: the latents reach the denoiser '
                       'in no other way')
    _ = self.make_bottleneck()  # raises for bad fsq_levels or fsq_dropout
    if self.local_embeddings and self.slots == 1:
      raise ValueError(f'variants.local_embeddings needs model.num_latents, {self.num_latents}, and the '
                       f'{self.grid[1]} frames of the token grid to have a common factor')

  @property
  def slots(self) -> int:
    """Parts of a chunk's frames that have embeddings of their own: 1 for summary embeddings."""
    return math.gcd(self.num_latents, self.grid[1]) if self.local_embeddings else 1

  @property
  def sequence(self) -> tuple:
    return math.prod(self.grid) // self.slots, self.num_latents // self.slots

  @property
  def encoder_channels(self) -> int:
    return self.channels * (3 if self.magnitude_input else 2)

  @property
  def denoiser_channels(self) -> int:
    return self.channels * (3 if self.envelope else 2)

  @property
  def denoiser_extra(self) -> int:
    return self.denoiser_registers + (self.num_latents if self.denoiser_latents else 0)

  @property
  def packs(self) -> tuple:
    return packing.ladder_packs(self.widths, self.strides, tile=self.packing_tile)

  def patchifier(self, in_channels, **options):
    if not self.packing_tile:
      return super().patchifier(in_channels, **options)
    return packing.PackedPatchifier(in_channels, stem=self.stem, packs=self.packs, **self.ladder, **options)

  def depatchifier(self, **options):
    if not self.packing_tile:
      return super().depatchifier(**options)
    return packing.PackedDePatchifier(grid=self.grid, packs=self.packs, **self.ladder, **options)

  def output_head(self, out_channels, **options):
    if not self.packing_tile:
      return super().output_head(out_channels, **options)
    return packing.PackedOutputHead(self.widths[0], out_channels, stem=self.stem, pack=self.packs[0],
                                    dtype=jnp.dtype(self.dtype), **options)

  def encoder(self, *, rngs):
    return VariantEncoder(self, rngs=rngs)

  def decoder(self, *, rngs):
    return VariantDecoder(self, rngs=rngs) if self.envelope or not self.no_cross_connections else None

  def denoiser(self, *, rngs):
    return VariantDenoiser(self, rngs=rngs)

  def make_bottleneck(self):
    if self.fsq:
      return FSQ(levels=self.fsq_levels, dropout=self.fsq_dropout)
    return super().make_bottleneck()

  def features(self, decoded, z):
    features = dict(decoded or {})
    if self.no_cross_connections:
      features.pop('maps', None)
    return {**features, 'z': z} if self.denoiser_latents else features


class VariantEncoder(Encoder):
  """An encoder with log-magnitudes at its input, slots, and linear paths beside it, where `arch` has them."""

  def __init__(self, arch, *, rngs):
    super().__init__(arch, rngs=rngs)
    tokens, latents = (arch.sequence[0], arch.dim), (arch.sequence[1], arch.latent_dim)
    self.shortcut = linear_paths.LatentShortcut(
        tokens, latents, width=arch.shortcut_width, rngs=rngs) if arch.shortcut_width else None
    self.sketch = LatentSketch((*arch.sketch_cells, arch.channels), latents, rngs=rngs) if arch.sketch_cells else None
    self.grid, self.slots = arch.grid, arch.slots
    self.magnitude_input, self.latent_norm = arch.magnitude_input, arch.latent_norm

  def __call__(self, spec):
    b, s = spec.shape[:2]
    x = spec.reshape(b * s, *spec.shape[2:])
    tokens = self.tokens(jnp.concatenate([x, log_magnitude(x)], axis=-1) if self.magnitude_input else x)
    if self.slots > 1:
      tokens = split_slots(tokens, self.grid, self.slots)
    latents = self.summarise(tokens)
    if self.shortcut is not None:
      latents = latents + self.shortcut(tokens.astype(jnp.float32))
    if self.sketch is not None:
      latents = latents + self.sketch(log_magnitude(x))
    if self.latent_norm:
      latents = linear_paths.latent_norm(latents)
    return latents.reshape(b, s, self.slots * latents.shape[1], latents.shape[2])


class VariantDecoder(Decoder):
  """A decoder with slots, linear paths and the envelope's head, where `arch` has them.

  With the envelope its features have 'log_magnitude' [B, S, F, T, C] float32, too.
  """

  def __init__(self, arch, *, rngs):
    super().__init__(arch, rngs=rngs)
    tokens, latents = (arch.sequence[0], arch.dim), (arch.sequence[1], arch.latent_dim)
    self.shortcut = linear_paths.TokenShortcut(
        latents, tokens, width=arch.shortcut_width, rngs=rngs) if arch.shortcut_width else None
    self.envelope = EnvelopeHead(arch, rngs=rngs) if arch.envelope else None
    self.sketch = EnvelopeSketch(
        latents, (*arch.sketch_cells, arch.channels), bins=arch.bins, frames=arch.frames,
        rngs=rngs) if arch.sketch_cells else None
    self.grid, self.slots = arch.grid, arch.slots
    self.feature_norm = arch.feature_norm

  def __call__(self, z):
    b, s = z.shape[:2]
    z = z.reshape(b * s * self.slots, z.shape[2] // self.slots, z.shape[3])
    x = self.tokens(z, None if self.shortcut is None else self.shortcut(z))
    if self.slots > 1:
      x = join_slots(x, self.grid, self.slots)
    finest, maps = self.depatchifier(x)
    features = {'maps': tuple(linear_paths.rms_normalise(m) for m in maps) if self.feature_norm else tuple(maps)}
    if self.envelope is not None:
      features['log_magnitude'] = self.envelope(finest) + (0 if self.sketch is None else self.sketch(z))
    return jax.tree.map(lambda x: x.reshape(b, s, *x.shape[1:]), features)


class VariantDenoiser(Denoiser):
  """A denoiser that sees the latents as tokens, registers, and the predicted envelope, where `arch` has them."""

  def __init__(self, arch, *, rngs):
    super().__init__(arch, rngs=rngs)
    dim, registers = arch.dim, arch.denoiser_registers
    self.latents_in = (
        Linear(arch.latent_dim, dim, axes=('latent_dim', 'embed'), rngs=rngs) if arch.denoiser_latents else None)
    self.registers = (
        param(rngs, (registers, dim), ('registers', 'embed'), normal(dim ** -0.5)) if registers else None)
    self.envelope_input = arch.envelope

  def __call__(self, x, sigma, features):
    if self.envelope_input:
      x = jnp.concatenate([x, jax.lax.stop_gradient(features['log_magnitude'])], axis=-1)
    return super().__call__(x, sigma, features)

  def extra_tokens(self, features, lead) -> list:
    extra = []
    if self.latents_in is not None:
      extra.append(self.latents_in(features['z'].astype(self.dtype), jnp.float32))
    if self.registers is not None:
      extra.append(jnp.broadcast_to(self.registers[...], (*lead, *self.registers.shape)))
    return extra
