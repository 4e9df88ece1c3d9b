"""States as vectors: the same numbers as states of trees, and back."""

import jax
import numpy as np
import optax

from m2l2.training.ravel import Apart, Ravel

TREE = {'a': np.arange(6, dtype=np.float32).reshape(2, 3),
        'b': {'c': np.float32([7]), 'd': np.ones((2, 1, 2), np.float32)}}


def test_a_vector_holds_all_in_the_order_of_the_leaves():
  ravel = Ravel(TREE)
  vector = ravel.vector(jax.tree.map(jax.numpy.asarray, TREE))
  assert ravel.size == 11 and vector.tolist() == [0, 1, 2, 3, 4, 5, 7, 1, 1, 1, 1]
  for back in (ravel.tree(vector), ravel.tree(np.asarray(vector))):
    jax.tree.map(np.testing.assert_array_equal, back, TREE)


def test_states_are_packed_and_unpacked():
  """Parameters and moments become vectors, counters stay; what is unpacked does not change with the vector."""
  optimizer = optax.adam(1e-2)
  params = jax.tree.map(jax.numpy.asarray, TREE)
  state = (jax.numpy.int32(3), params, optimizer.init(params))
  ravel = Ravel(params)
  packed = ravel.ravel(state)
  assert sorted(x.shape for x in jax.tree.leaves(packed)) == [(), (), (11,), (11,), (11,)]
  back = ravel.unravel(packed)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  assert not np.shares_memory(back[1]['a'], np.asarray(packed[1]))
  shapes = ravel.ravel(jax.eval_shape(lambda: state))
  assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(*map(jax.tree.leaves, (shapes, packed))))
  assert Apart().ravel(state) is state and Apart().unravel(state) is state


def test_an_optimizer_makes_the_same_update():
  """Clipped by the norm of all, which is summed in another order."""
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(), optax.scale(-0.1))
  params = jax.tree.map(jax.numpy.asarray, TREE)
  ravel = Ravel(params)

  def updated(stored):
    values, state = stored(params), optimizer.init(stored(params))
    for scale in (1.0, 0.5):
      updates, state = optimizer.update(stored(jax.tree.map(lambda x: scale * x, params)), state, values)
      values = optax.apply_updates(values, updates)
    return values

  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
               ravel.tree(updated(ravel.vector)), updated(lambda tree: tree))
