"""Pre-norm transformer with QK-norm and SwiGLU; its layers are stacked, scanned and rematerialised.

The residual stream and what products add to it are float32 whatever the dtype of the layers: 24 roundings to bfloat16
would double the error of the whole model (measured against torch's autocast, which keeps the stream in float32 too).
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m2l2 import sharding
from m2l2.kernels import norms
from m2l2.kernels.chunk_causal import chunk_causal_attention
from m2l2.kernels.contraction import contract
from m2l2.model.layers import LayerNorm, Linear, RMSNorm, as_last
from m2l2.model.parameters import ZEROS, normal, param
from m2l2.model.remat import product, rematerialised


def by_parts(x, kernel, *axes):
  """x by each part of a kernel [D, parts, ...] -> as many float32 arrays, sharded along `axes`.

  Not one product that is sliced: on a TPU the slices, and the padding of their gradients, are passes of their own.
  """
  kernel = kernel[...].astype(x.dtype)
  return [sharding.constrain(contract(x, kernel[:, i], 1, jnp.float32), *axes) for i in range(kernel.shape[1])]


class Attention(nnx.Module):
  """x -> to_out(SDPA(q, k, v)); q and k are RMS-normalised per head; the output projection starts at 0."""

  def __init__(self, dim, *, heads, impl, rngs):
    head_dim = dim // heads
    self.qkv = Linear(dim, (3, heads, head_dim), axes=('embed', 'qkv', 'heads', 'head_dim'), bias=False, rngs=rngs)
    self.q_norm = RMSNorm(head_dim, rngs=rngs)
    self.k_norm = RMSNorm(head_dim, rngs=rngs)
    self.out = param(rngs, (heads, head_dim, dim), ('heads', 'head_dim', 'embed'), ZEROS)
    self.impl = impl

  def __call__(self, x):
    """[B, S, P, D] in the dtype of products -> the same shape, float32."""
    b, s, p, d = x.shape
    q, k, v = by_parts(x.reshape(b, s * p, d), self.qkv.kernel, 'batch', None, 'heads', None)
    # Fused with what its product gives, the norm's sum is taken across lanes on a TPU, and the heads copied twice.
    q, k = jax.lax.optimization_barrier((q, k))
    q, k = (norms.head_norm(x32, norm.gain[...], eps=norm.eps, dtype=x.dtype)
            for x32, norm in ((q, self.q_norm), (k, self.k_norm)))
    v = product(v.astype(x.dtype))
    spec = sharding.activation_spec(q.shape, 'batch', None, 'heads', None)
    out = product(chunk_causal_attention(q, k, v, num_chunks=s, impl=self.impl, spec=spec))
    return product(contract(out, self.out[...].astype(x.dtype), 2, jnp.float32)).reshape(b, s, p, d)


class SwiGLU(nnx.Module):
  """Linear to two halves a and b of dim * mult / 2, SiLU(a) * b, zero-initialised Linear back."""

  def __init__(self, dim, *, mult, rngs):
    hidden = dim * mult // 2
    self.inner = Linear(dim, (2, hidden), axes=('embed', 'gate', 'mlp'), bias=False, rngs=rngs)
    self.out = Linear(hidden, dim, axes=('mlp', 'embed'), init=ZEROS, bias=False, rngs=rngs)

  def __call__(self, x):
    """[B, S, P, D] in the dtype of products -> the same shape, float32."""
    a, b = by_parts(x, self.inner.kernel, 'batch', None, None, 'mlp')
    return product(norms.swiglu_product(a, b, self.out.kernel[...].astype(x.dtype), x.dtype))


class Block(nnx.Module):
  def __init__(self, dim, *, heads, mlp_mult, cond_dim, impl, rngs):
    self.attention_norm = LayerNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.attention = Attention(dim, heads=heads, impl=impl, rngs=rngs)
    self.mlp_norm = LayerNorm(dim, cond_dim=cond_dim, rngs=rngs)
    self.mlp = SwiGLU(dim, mult=mlp_mult, rngs=rngs)

  def __call__(self, x, cond=None, *, dtype=jnp.float32):
    """x [B, S, P, D] float32 -> the same; attention and MLP compute in `dtype`."""
    with jax.named_scope('attention'):
      x = x + self.attention(self.attention_norm(x, cond).astype(dtype))
    with jax.named_scope('mlp'):
      x = x + self.mlp(self.mlp_norm(x, cond).astype(dtype))
    # Said in the loop's body: without it the compiler changes its mind about the carry, and copies it whole.
    return sharding.constrain(x, 'batch', None, None, None)


class Transformer(nnx.Module):
  """Tokens [B, S, P, D] -> the residual stream [B, S, P, D] float32, chunk-causal over S.

  The layers' products read `dtype`, that of the tokens by default.

  Learned positions over [chunks, tokens]; one norm after adding them; `norm_output` (an attribute) is for
  the caller that wants it (present where `output_norm`).
  """

  def __init__(self, dim, *, layers, heads, mlp_mult, tokens, chunks=1, cond_dim=None, output_norm=True,
               remat='blocks', impl='auto', rngs):
    self.positions = param(rngs, (chunks, tokens, dim), ('chunks', 'tokens', 'embed'), normal(dim ** -0.5))
    self.norm_input = LayerNorm(dim, cond_dim=cond_dim, rngs=rngs)

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
      return Block(dim, heads=heads, mlp_mult=mlp_mult, cond_dim=cond_dim, impl=impl, rngs=rngs)

    self.layers = stack(rngs)
    self.norm_output = LayerNorm(dim, cond_dim=cond_dim, rngs=rngs) if output_norm else None
    self.remat = remat

  def __call__(self, x: Float[Array, 'B S P D'], cond: Float[Array, 'B S E'] | None = None,
               dtype=None) -> Float[Array, 'B S P D']:
    dtype = dtype or x.dtype
    x = x.astype(jnp.float32)
    x = self.norm_input(x + as_last(self.positions[...][:x.shape[1]], x), cond)
    graphdef, stacked = nnx.split(self.layers)

    def layer(x, state):
      return nnx.merge(graphdef, state)(x, cond, dtype=dtype), None

    with jax.named_scope('layers'):
      return jax.lax.scan(rematerialised(layer, self.remat), x, stacked)[0]
