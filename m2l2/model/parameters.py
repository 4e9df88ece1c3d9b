"""Parameters that know their axes and their initialisers: what every layer is made of. All are float32."""

from collections.abc import Callable
import contextlib
import contextvars
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from m2l2.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Init:
  """An initialiser: `scale` times what `draw(key, shape)` gives, float32; with the name that parameter tables show."""
  name: str
  draw: Callable
  scale: float = 1.0


def _zeros(key, shape):
  return jnp.zeros(shape, jnp.float32)


def _ones(key, shape):
  return jnp.ones(shape, jnp.float32)


def _uniform(key, shape):
  return jax.random.uniform(key, shape, jnp.float32, -1, 1)


ZEROS = Init('zeros', _zeros)
ONES = Init('ones', _ones)


def normal(std: float) -> Init:
  return Init(f'normal({std:.4g})', jax.random.normal, std)


def xavier(fan_in: int, fan_out: int) -> Init:
  """Xavier uniform; the fans are given because named dimensions hide them."""
  return Init(f'xavier({fan_in}, {fan_out})', _uniform, (6 / (fan_in + fan_out)) ** 0.5)


def draw_all(key, shapes, inits):
  """A tree of float32 arrays: `shapes` (of ShapeDtypeStructs) filled by `inits`, the same tree of Inits.

  All that one distribution gives is drawn as one vector and cut: a generator for each of a hundred arrays took XLA's
  CPU compiler as long as the train step.
  """
  leaves, structure = jax.tree.flatten(shapes)
  inits = jax.tree.leaves(inits)
  drawn = [None] * len(leaves)
  for i, draw in enumerate((_zeros, _ones, jax.random.normal, _uniform)):
    own = [n for n, init in enumerate(inits) if init.draw is draw]
    if draw in (_zeros, _ones) or not own:
      for n in own:
        drawn[n] = draw(None, leaves[n].shape)
      continue
    ends = np.cumsum([leaves[n].size for n in own]).tolist()
    # On a mesh every device makes its part: rounded up, so that any number of devices divides it.
    vector = constrain(draw(jax.random.fold_in(key, i), (-(-ends[-1] // 2**16) * 2**16,)), 'batch')
    for n, end in zip(own, ends):
      drawn[n] = inits[n].scale * vector[end - leaves[n].size:end].reshape(leaves[n].shape)
  return jax.tree.unflatten(structure, drawn)


def by_path(tree) -> dict[str, Any]:
  """{'encoder/w': array, ...}, in the order of the tree's leaves."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


_shapes_only = contextvars.ContextVar('shapes_only', default=False)


@contextlib.contextmanager
def shapes_only():
  """Modules made inside have parameters of zeros: where only shapes are asked for, to trace a generator for each
  parameter was most of the time that loading a model takes."""
  before = _shapes_only.set(True)
  try:
    yield
  finally:
    _shapes_only.reset(before)


def param(rngs: nnx.Rngs, shape, axes, init: Init) -> nnx.Param:
  """A float32 parameter that carries its logical axes and its initialiser."""
  if len(shape) != len(axes):
    raise ValueError(f'shape {shape} and axes {axes} differ in length')
  if _shapes_only.get():
    value = _zeros(None, tuple(shape))
  else:
    value = init.scale * init.draw(rngs.params(), tuple(shape))
  return nnx.Param(value, axes=tuple(axes), init=init)


def traced(build: Callable[[], nnx.Module]) -> tuple:
  """Of the module that `build()` makes: (graphdef; of its parameters, as nested dicts: shapes, Inits, logical axes).

  Nothing is allocated. nnx.merge(graphdef, params) is the module again, draw_all(key, shapes, inits) are its params;
  axes: a tuple of names for each, 'layers' where a stack was made by vmap.
  """
  def shaped():
    with shapes_only():
      return build()

  def axes_of(variable):
    axes = variable.get_metadata('axes')
    return ('layers',) * (len(variable.shape) - len(axes)) + axes

  graphdef, abstract = nnx.split(jax.eval_shape(shaped))
  of_each = lambda function: nnx.to_pure_dict(
      jax.tree.map(function, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable)))
  return (graphdef, of_each(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)),
          of_each(lambda v: v.get_metadata('init')), of_each(axes_of))
