"""The embeddings that Frechet distances are taken over, by name."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from m2l2.errors import UserError

if TYPE_CHECKING:  # so that the names can be read without importing a library
  import numpy as np

IN_THE_BOX = ('musicnn_mtt', 'musicnn_msd')
BY_FILE = ('vggish', 'clap')  # the user provides their weights
EMBEDDINGS = IN_THE_BOX + BY_FILE


def make_embedder(name: str, weights_file=None) -> Callable[..., 'np.ndarray']:
  """A function (audio float [channels, samples], sample_rate=Hz) -> float32 [windows, width]; it raises UserError for
  clips too short.

  Args:
    name: one of EMBEDDINGS. weights_file: of those in BY_FILE, see `vggish.load` and `clap.load`.
  Raises:
    UserError: unknown name, or no weights, or weights of another network.
  """
  if name in IN_THE_BOX:
    from m2l2.evaluation.embedders import musicnn
    return lambda audio, sample_rate: musicnn.embed(audio, sample_rate=sample_rate, name=name.removeprefix('musicnn_'))
  if name not in BY_FILE:
    raise UserError(f'there is no embedding called {name!r}: pick from {", ".join(EMBEDDINGS)}')
  if weights_file is None:
    raise UserError(f'{name} needs its weights, which m2l2 does not ship: give them with --{name}=FILE')
  from m2l2.evaluation.embedders import clap, vggish
  network = {'vggish': vggish, 'clap': clap}[name]
  params = network.load(weights_file)
  return lambda audio, sample_rate: network.embed(params, audio, sample_rate=sample_rate)


def remembering(embed: Callable[..., 'np.ndarray'], *, most: int = 1024) -> Callable[..., 'np.ndarray']:
  """The same function with a cache: the references are embedded again for every setting that is compared.

  most: number of cached results; the least recently used are dropped.
  """
  import hashlib

  import numpy as np
  known: dict[tuple, np.ndarray] = {}

  def embed_once(audio, sample_rate):
    key = hashlib.sha1(np.ascontiguousarray(audio).data).digest(), audio.shape, sample_rate
    known[key] = known.pop(key) if key in known else embed(audio, sample_rate)
    if len(known) > most:
      del known[next(iter(known))]
    return known[key]
  return embed_once
