"""Random numbers, the split of a file, and the item of a source that the sample at a global index takes.

Random numbers are raw 64-bit words of Philox, a counter-based generator. Its words are fixed by
definition, so the order of samples does not change with versions of NumPy and Grain.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import threading

import numpy as np

# The third word of the counter separates the random words of different uses.
_DRAWS, _SHUFFLE, _BLOCK, _PARTNER_DRAWS, _PARTNER = range(5)

SPLITS = ('train', 'validation')


def split_of(name: str, validation_fraction: float) -> str:
  """The split of a file, by its name alone: adding or removing files does not move others."""
  return SPLITS[digest('split', name) < validation_fraction * 2**64]


def digest(purpose: str, name: str) -> int:
  """A hash of a name to 64 bits, different for each use."""
  text = f'{purpose}\0{name}'.encode('utf-8', 'surrogateescape')
  return int.from_bytes(hashlib.sha256(text).digest()[:8], 'big')


@dataclasses.dataclass(frozen=True)
class DrawBits:
  """Four uniform 64-bit words that decide one draw."""

  file: int
  offset: int
  channel: int
  gain: int = 2**63


def draw_bits(*, seed: int, index: int, attempt: int, partner: bool = False) -> DrawBits:
  """The random words of one draw; a pure function of its arguments (each < 2**64).

  With `partner`, the words for the crop that is mixed with the sample's own.
  """
  stream = _PARTNER_DRAWS if partner else _DRAWS
  return DrawBits(*_philox([seed, index], [0, 0, stream, attempt]).random_raw(4).tolist())


def partner_bits(*, seed: int, index: int) -> tuple[int, int]:
  """Two words: whether the sample is mixed with another crop, and which source that crop is from."""
  return tuple(_philox([seed, index], [0, 0, _PARTNER, 0]).random_raw(2).tolist())


def below(bits: int, limit: int) -> int:
  """A uniform integer in [0, limit) from a uniform 64-bit word."""
  return bits * limit >> 64


def epoch_order(*, seed: int, epoch: int, count: int, source: int = 0) -> np.ndarray:
  """The permutation of `count` items in a source's epoch, integers [count]; a pure function.

  Grain's own shuffle is not used: below some thousand files its index cipher iterates long, for 2-6 ms per sample (12
  or 4 files) with the interpreter locked, longer than reading the crop.
  """
  words = _philox([seed, epoch], [0, source, _SHUFFLE, 0]).random_raw(count)
  return np.argsort(words, kind='stable').astype(np.uint32 if count <= 2**32 else np.int64)


@functools.lru_cache(maxsize=64)  # a sample's neighbours in the order ask for the same block
def block_order(*, seed: int, block: int, weights: tuple[int, ...]) -> np.ndarray:
  """The source of each sample of a block of sum(weights): each as often as its weight; a pure function."""
  words = _philox([seed, block], [0, 0, _BLOCK, 0]).random_raw(sum(weights))
  return np.repeat(np.arange(len(weights)), weights)[np.argsort(words, kind='stable')]


def _philox(key: list[int], counter: list[int]) -> np.random.Philox:
  # Arrays, for NumPy would take a list with a word above 2**63 through float64.
  return np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))


class Order:
  """`order(index) -> (source, item)` of the sample at a global index; a pure function.

  Every block of sum(weights) samples holds each source as often as its weight, so a source's share
  is exact, and the number of samples that it gave before any index is known without counting. Each
  source then goes through its own epochs: every item once, in an order shuffled anew each time.

  Two epochs of each source are in memory, 4 bytes per item: 40 MB an epoch for 10**7 items (more while it is shuffled).
  Thread-safe.

  Args:
    counts: how many items each source has.
    weights: whole numbers, one for each source.
    seed: in [0, 2**64).
  """

  def __init__(self, *, counts: tuple[int, ...], weights: tuple[int, ...], seed: int):
    self._counts, self._weights, self._seed = counts, weights, seed
    self._ends = list(itertools.accumulate(weights))
    self._lock = threading.Lock()
    self._epochs: list[dict] = [{} for _ in counts]

  def __reduce__(self):
    # A worker process shuffles by itself: orders are not pickled.
    return _order, (self._counts, self._weights, self._seed)

  def __call__(self, index: int) -> tuple[int, int]:
    source, position = self.place(index)
    epoch, place = divmod(position, self._counts[source])
    return source, int(self._shuffled(source, epoch)[place])

  def place(self, index: int) -> tuple[int, int]:
    """(source, number of samples of that source before `index`)."""
    if len(self._weights) == 1:
      return 0, index
    block, place = divmod(index, self._ends[-1])
    order = block_order(seed=self._seed, block=block, weights=self._weights)
    source = int(order[place])
    return source, block * self._weights[source] + int(np.count_nonzero(order[:place] == source))

  def source_of(self, bits: int) -> int:
    """A source drawn by weight with a uniform 64-bit word."""
    return bisect.bisect_right(self._ends, below(bits, self._ends[-1]))

  def _shuffled(self, source: int, epoch: int) -> np.ndarray:
    with self._lock:  # so that threads wait for one order instead of each computing it
      epochs = self._epochs[source]
      if epoch not in epochs:
        while len(epochs) > 1:
          del epochs[min(epochs)]
        epochs[epoch] = epoch_order(
            seed=self._seed, epoch=epoch, count=self._counts[source], source=source)
      return epochs[epoch]


def _order(counts, weights, seed) -> Order:
  return Order(counts=counts, weights=weights, seed=seed)
