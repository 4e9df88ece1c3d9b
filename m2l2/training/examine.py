"""An update item by item: what of it is not finite, and which array was the first. Pure functions, for replay.py."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from m2l2.model.parameters import by_path


def examine(loss_fn: Callable, params, audio, keys, step) -> dict:
  """Each item's loss and gradient by itself, one after the other, so that it takes no more memory than one.

  Args:
    loss_fn: `Objective.loss_fn`, its `head` bound.
    params: tree of G float32 arrays.
    audio, keys: float32 [B, C, N] and [B], the items and their randomness, as the update has them.
    step: int32[], of the state before the update.

  Returns:
    dict of arrays:
      'loss': f32[B]
      'sigma_high', 'sigma_low': f32[B, S], the noise levels of the items' chunks (absent where none was drawn)
      'finite': {name: bool[B, S]}, whether all of an array is finite that was computed on the way from audio to loss;
        the names begin with numbers, in whose order they were computed
      'item_gradients': f32[B, G], norms, in the order of jax.tree.leaves(params); not finite where a gradient is not
      'gradients': f32[G], the same of the mean over items
  """
  def add_item(total, item):
    audio, key = item
    watched = lambda params: _watched(loss_fn, params, audio, key, step)
    (_, told), gradients = jax.value_and_grad(watched, has_aux=True)(params)
    told['item_gradients'] = _norms(gradients)
    return jax.tree.map(jnp.add, total, gradients), told

  total, told = jax.lax.scan(add_item, jax.tree.map(jnp.zeros_like, params), (audio, keys))
  return {**told, 'gradients': _norms(total) / audio.shape[0]}


def whole(tree) -> list:
  """bool[] of each array of a tree: whether all of it is finite."""
  return [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]


def _watched(loss_fn, params, audio, key, step):
  """-> (loss, what `examine` tells of this item) of audio [C, N] and its key."""
  levels: dict[str, jax.Array] = {}
  finite: dict[str, jax.Array] = {}

  def watch(**seen):
    for name, tree in seen.items():
      if name.startswith('sigma'):
        levels[name] = tree[0]
        continue
      for part, x in by_path(tree).items():
        place = f'{len(finite):03d} {name}{"/" * bool(part)}{part}'
        finite[place] = jnp.all(jnp.isfinite(x[0]), axis=tuple(range(1, x.ndim - 1)))

  loss, _ = loss_fn(params, audio[None], key[None], step, watch=watch)
  return loss, {'loss': loss, **levels, 'finite': finite}


def _norms(tree):
  """f32[G]."""
  return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(tree)])
