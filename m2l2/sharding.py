"""Sharding: the mesh of devices, the tables from logical axes to mesh axes, and batches.

Layers name the axes of their parameters ('embed', 'heads', ...). A preset maps some of those names
to axes of the mesh; the batch is always split over 'data' and 'fsdp' together. So moving a model
from one chip to a pod is a matter of the config (`mesh.preset`, `mesh.data`, `mesh.fsdp`,
`mesh.tensor`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from m2l2.errors import UserError

MESH_AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')

# Logical axis -> mesh axis. Names that are not in a table are free: see `param_shardings`.
#   dp    every device holds all parameters
#   fsdp  parameters are spread over the 'fsdp' axis, which is the whole slice
#   hsdp  the same table on a mesh with a small 'fsdp' axis, copied along 'data'. Right for ~100 M
#         parameters: over a whole pod a shard is a few rows, and XLA gathers those very badly.
#   tp    heads and the MLP's width over 'tensor' as well
PRESETS = {
  'dp': {},
  'fsdp': {'embed': 'fsdp'},
  'hsdp': {'embed': 'fsdp'},
  'tp': {'embed': 'fsdp', 'heads': 'tensor', 'mlp': 'tensor'},
}

# Logical axes of activations, the same for every preset: an axis of size 1 does nothing.
ACTIVATIONS = {'batch': BATCH_AXES, 'heads': 'tensor', 'mlp': 'tensor'}

MIN_SIZE = 2**18  # numbers; a smaller array costs more to gather than to keep (1 MiB of float32)
NEVER_FREE = (None, 'layers')  # 'layers' is scanned over: a split there would gather at each layer


@dataclasses.dataclass(frozen=True)
class Placement:
  """`shardings`: tree of NamedSharding; `unplaced`: (path, shape) of large arrays left whole."""
  shardings: Any
  unplaced: tuple[tuple[str, tuple[int, ...]], ...]


def make_mesh(*, data=-1, fsdp=1, tensor=1, devices=None) -> Mesh:
  """A mesh with the axes ('data', 'fsdp', 'tensor'), all of type Auto, laid along the network of the devices.

  The network between slices (of TPUs, or nodes of GPUs) is slower: slices lie along 'data' as far as its size allows.

  Args:
    data, fsdp, tensor: sizes; one of them may be -1: all remaining devices.
    devices: all devices by default.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or cannot be laid over its slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = mesh_sizes(data=data, fsdp=fsdp, tensor=tensor, count=len(devices))
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices > 1:
    between = split_over_slices(sizes, slices)
    inside = tuple(size // count for size, count in zip(sizes, between))
    grid = mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def split_over_slices(sizes, slices: int) -> tuple[int, ...]:
  """The number of slices along each axis of a mesh: as many as divide the first axis, the rest along the next."""
  left, parts = slices, []
  for size in sizes:
    parts.append(math.gcd(size, left))
    left //= parts[-1]
  if left > 1:
    raise UserError(f'a mesh of {" x ".join(map(str, sizes))} devices cannot be laid over {slices} slices: make '
                    f'mesh.data a multiple of {slices}')
  return tuple(parts)


def mesh_sizes(*, data, fsdp, tensor, count) -> tuple[int, int, int]:
  """The sizes of a mesh of `count` devices, -1 resolved. Raises UserError where they do not multiply to it."""
  sizes = [data, fsdp, tensor]
  asked = ', '.join(f'mesh.{name}={size}' for name, size in zip(MESH_AXES, sizes))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f'{asked}: sizes are 1 or more, and one may be -1 to take what is left')
  if -1 in sizes:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count:
    raise UserError(f'{asked} do not multiply to the {count} devices of this run')
  return tuple(sizes)


def is_one_cpu(mesh) -> bool:
  """Whether the mesh is a single CPU device."""
  return mesh.size == 1 and mesh.devices.flat[0].platform == 'cpu'


def _spec(shape, names, *, sizes, table, min_size):
  """The mesh axis (or None) of each dimension of one array, and whether no dimension could be split over fsdp."""
  axes = [table.get(name) if name is not None else None for name in names]
  used = [axis for axis in axes if axis is not None]
  if len(set(used)) != len(used):
    raise ValueError(f'two logical axes of {names} land on one mesh axis: {axes}')
  if math.prod(shape) < min_size:
    return [None] * len(shape), False
  axes = [a if a is not None and sizes[a] > 1 and dim % sizes[a] == 0 else None
          for a, dim in zip(axes, shape)]
  if 'fsdp' not in table.values() or sizes['fsdp'] == 1 or 'fsdp' in axes:
    return axes, False
  free = [i for i, name in enumerate(names)
          if name not in NEVER_FREE and axes[i] is None and shape[i] % sizes['fsdp'] == 0]
  if not free:
    return axes, True
  axes[max(free, key=lambda i: shape[i])] = 'fsdp'
  return axes, False


def param_shardings(abstract_tree, logical_axes_tree, *, mesh, preset,
                    min_size=MIN_SIZE) -> Placement:
  """A NamedSharding for each parameter, from the names of its axes.

  An axis that the preset's table names goes to that mesh axis. A large array whose named axes left
  'fsdp' unused takes it on its largest divisible dimension (named None or 'layers' never). Arrays
  below `min_size` numbers stay whole.

  Args:
    abstract_tree: tree of arrays or ShapeDtypeStructs.
    logical_axes_tree: the same tree with a tuple for each array, one name or None per dimension.
    mesh: from `make_mesh`.
    preset: a key of PRESETS.
    min_size: numbers in the smallest array that is split.

  Raises:
    UserError: unknown preset.
    ValueError: names that do not fit a shape, or two names on one mesh axis.
  """
  if preset not in PRESETS:
    raise UserError(f'mesh.preset={preset!r} is not known: choose one of {", ".join(PRESETS)}')
  sizes, table, unplaced = dict(mesh.shape), PRESETS[preset], []

  def place(path, array, names):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    if len(names) != len(array.shape):
      raise ValueError(f'{where}: shape {array.shape} has not one name per axis in {names}')
    try:
      axes, homeless = _spec(array.shape, names, sizes=sizes, table=table, min_size=min_size)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
    if homeless:
      unplaced.append((where, tuple(array.shape)))
    return NamedSharding(mesh, P(*axes))

  shardings = jax.tree_util.tree_map_with_path(place, abstract_tree, logical_axes_tree)
  return Placement(shardings=shardings, unplaced=tuple(unplaced))


def state_shardings(abstract_state, params_shardings, *, mesh):
  """Shardings for a whole state: subtrees built like the parameters (EMA, moments) take theirs.

  All other arrays (counters) are replicated.
  """
  structure: Any = jax.tree.structure(params_shardings)  # as in ravel.py
  whole = replicated(mesh)

  def like_params(tree):
    return structure == jax.tree.structure(tree)

  return jax.tree.map(
    lambda tree: params_shardings if like_params(tree) else whole,
    abstract_state, is_leaf=like_params)


def replicated(mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh) -> NamedSharding:
  """Dimension 0 split over the 'data' and 'fsdp' axes together."""
  return NamedSharding(mesh, P(BATCH_AXES))


def batch_shards(mesh) -> int:
  """Into how many parts a batch is split: the batch size is a multiple of it."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_blocks(mesh) -> tuple[tuple[int, ...], int]:
  """(h, H): the global batch has H equal blocks of rows, and this process provides the blocks h, in that order.

  Usually h is one block, the process's own number. A mesh that is ordered by the network may number the processes
  differently, or give one of them rows that are not adjacent; processes along 'tensor' provide the same rows.
  """
  shards = batch_shards(mesh)
  indices = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
  return joined_blocks({index[0].start or 0 for index in indices if index}, shards)


def joined_blocks(rows, count: int) -> tuple[tuple[int, ...], int]:
  """Merges adjacent blocks: (blocks, count) -> the smallest (blocks, count) with the same rows."""
  rows = sorted(rows)
  together = rows == list(range(rows[0], rows[0] + len(rows)))
  if together and rows[0] % len(rows) == 0 and count % len(rows) == 0:
    return (rows[0] // len(rows),), count // len(rows)
  return tuple(rows), count


def put_batch(batch, mesh):
  """Global arrays from this process's rows: tree of numpy [B', ...] -> [B, ...] on the mesh.

  `batch_blocks` says which rows those are.
  """
  sharding = batch_sharding(mesh)
  own, count = batch_blocks(mesh)

  def put(x):
    size = len(x) // len(own)  # rows of a block
    shape = (size * count, *x.shape[1:])

    def rows_at(index):
      first = index[0].start or 0
      last = shape[0] if index[0].stop is None else index[0].stop
      begin = own.index(first // size) * size + first % size
      return x[begin:begin + last - first]

    return jax.make_array_from_callback(shape, sharding, rows_at)

  with jax.transfer_guard_host_to_device('allow'):  # the only intended transfer of a step
    return jax.tree.map(put, batch)


def fetch(tree, *, here: bool = True):
  """The whole tree as numpy arrays. If arrays span several processes, all of them must call this.

  The results are copies: the arrays may be donated afterwards. here: whether this process needs them; if not, it takes
  part in the gathering and gets a tree of None.
  """

  def copied(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      assert isinstance(x.sharding, NamedSharding)
      whole = x if x.is_fully_replicated else _gather(x.sharding.mesh)(x)
      x = whole.addressable_data(0)
    if not here:
      return None
    # On a CPU, device_get returns a view, and the next step may overwrite it.
    return np.array(jax.device_get(x), copy=jax.default_backend() == 'cpu' or None)

  return jax.tree.map(copied, tree)


@functools.cache  # one function a mesh, so that each shape is compiled once and not at every save
def _gather(mesh):
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def constrain(x, *names):
  """Constrains how the dimensions of an activation are split, by logical names ('batch', None, 'heads').

  Uses the mesh of `jax.set_mesh`. Without a mesh it does nothing; a dimension that its mesh axes do not divide, or
  whose name is unknown, is left free.
  """
  spec = activation_spec(x.shape, *names)
  return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def activation_spec(shape, *names) -> P | None:
  """The PartitionSpec of an activation of that shape on the mesh of `jax.set_mesh`; None without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:  # the latter inside a shard_map, where each device has its own rows
    return None
  if len(names) != len(shape):
    raise ValueError(f'{len(names)} names {names} for an array of shape {shape}')

  def axis_of(name, dim):
    axes = ACTIVATIONS.get(name)
    if axes is None:
      return None
    parts = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))
    return axes if parts > 1 and dim % parts == 0 else None

  return P(*(axis_of(name, dim) for name, dim in zip(names, shape)))
