"""Encoder, decoder and denoiser as one module (figure 1): what a checkpoint holds.

The functions at the end run it on a plain tree of dicts of parameters, which is all that training, Codec and
checkpoints ever see.
"""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.model.architecture import Architecture
from m2l2.model.parameters import draw_all, traced


class Autoencoder(nnx.Module):
  """The three networks that share a config; see the functions of `Network` for what they compute."""

  def __init__(self, arch: Architecture, *, rngs):
    self.encoder = arch.encoder(rngs=rngs)
    self.decoder = arch.decoder(rngs=rngs)
    self.denoiser = arch.denoiser(rngs=rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """The autoencoder as pure functions of `params`, dicts of dicts of float32 arrays.

  init(key) -> params
  encode(params, spec [B, S, F, T, 2C]) -> [B, S, L, Z] float32, before the bottleneck
  decode(params, z [B, S, L, Z]) -> features: {'maps': (...)}, every leaf [B, S, ...]; variants have others
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
        return getattr(module, name)(*jax.tree.map(jnp.asarray, args))
    return jax.checkpoint(run) if arch.remat == 'full' else run

  def decode(params, z):
    return arch.features(part('decoder')(params, z) if 'decoder' in shapes else None, z)

  return Network(
      arch=arch,
      init=lambda key: draw_all(key, shapes, inits),
      encode=part('encoder'), decode=decode, denoise=part('denoiser'),
      logical_axes=axes, init_names=jax.tree.map(lambda init: init.name, inits), shapes=shapes)
