"""Shapes in signatures are checked while tests run: each of these calls is refused for its shapes alone."""

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import pytest

from m2l2.codec.sampler import Sampler
from m2l2.consistency import Consistency
from m2l2.kernels import norms
from m2l2.kernels.chunk_causal import chunk_causal_attention
from m2l2.model.patches import join_patches
from m2l2.representation import Representation
from m2l2.training.train_step import Objective

Shape = jax.ShapeDtypeStruct


@pytest.mark.parametrize('call, shapes', [
    (norms.swiglu_product, [(4, 8), (4, 7), (8, 3)]),  # no halves
    (lambda x, scale: norms.group_norm(x, scale, groups=2, eps=1e-5), [(3, 4, 4, 8), (2, 8)]),  # gains of other maps
    (lambda q, k, v: chunk_causal_attention(q, k, v, num_chunks=2), [(1, 8, 2, 4), (1, 8, 2, 4), (1, 8, 4, 4)]),
    (join_patches, [(2, 4, 4, 8)]),
    (Representation().compress, [(3, 4, 3)]),
    (lambda x, y: Consistency().distance(x, y), [(2, 2, 8), (2, 1, 8)]),  # would broadcast
    (lambda audio: Objective(None, None, None, 1).draw(audio, jax.random.split(jax.random.key(0), 2), 0, None),
     [(3, 1, 64)]),  # keys of fewer crops
    (lambda z, noise: Sampler(None, None, None).advance({}, {}, z, 0, 1, jnp.full(2, 3), noise, 1, sigmas=(80,),
                                                        refine=True),
     [(2, 3, 8, 4), (3, 2, 16, 8, 2)])])  # no noise of the chunk before
def test_a_wrong_shape_is_refused(call, shapes):
  with pytest.raises(TypeCheckError):
    jax.eval_shape(call, *(Shape(shape, jnp.float32) for shape in shapes))
