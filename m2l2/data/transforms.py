"""From an item of a source to one training crop: pure functions of (seed, index) and of the sources."""

from collections import deque
import dataclasses
import math
import threading

from absl import logging
import numpy as np

from m2l2.data import audio_io
from m2l2.data.order import DrawBits, Order, below, draw_bits, partner_bits
from m2l2.data.sources import Mixture
from m2l2.errors import UserError

MAX_ATTEMPTS = 64

# soxr HQ's filter reaches 128 samples of the lower rate to each side (the error of a piece cut from
# the middle falls to float32 rounding, 5e-7, there); twice that is read around a crop.
_MARGIN = 256

# A float file scaled to integers (peak 32768) would ruin a run; loud lossy files reach about 2.
_MAX_PEAK = 100.0

# A header may claim 255 channels at 4 GHz: values of one crop, before resampling (128 MB of float32).
_MOST_VALUES = 2**25
_LEAST_RATE = 1000  # Hz

# An item is named as silent when its first draws in this process were all silent.
_SILENT_DRAWS = 4
_GOOD, _NAMED = 8, 16  # flags of an item's state
_MOST_NAMED = 10_000


@dataclasses.dataclass(frozen=True)
class CropSpec:
  """The properties of training crops.

  Attributes:
    crop_samples: its length.
    channels: 1 (a random channel of the file) or 2 (see `pick_channels`).
    native_rates: Hz; files at these rates are not resampled, others resampled to the first.
    rms_floor: crops below this RMS (full scale is 1) are rejected as silent.
    gain_db: each crop is scaled by a uniform random gain within +-gain_db dB; 0 leaves it.
    mix: the chance that a sample is the sum of two crops, clipped to [-1, 1].
  """

  crop_samples: int
  channels: int
  native_rates: tuple[int, ...]
  rms_floor: float
  gain_db: float = 0.0
  mix: float = 0.0


@dataclasses.dataclass(frozen=True)
class CropWindow:
  """The place of a crop: read [start, start + frames) of the file, resample to `rate`, drop `skip` samples, keep
  the crop."""

  start: int
  frames: int
  skip: int
  rate: int


class SilentCrop(UserError):
  """A crop below the RMS floor; its file is not faulty."""


def root_mean_square(audio: np.ndarray) -> float:
  return math.sqrt(np.mean(np.square(audio, dtype=np.float64)))


def pick_channels(audio: np.ndarray, *, channels: int, bits: int) -> np.ndarray:
  """[any, N] -> [channels, N]: the channel policy.

  channels=1: one channel of the file, drawn by `bits`. channels=2: stereo as it is, mono doubled;
  of more than two the first two (left and right in every standard layout).
  """
  if channels == 1:
    number = below(bits, audio.shape[0])
    return audio[number:number + 1]
  return audio[:2] if audio.shape[0] > 1 else np.repeat(audio, 2, axis=0)


def crop_window(*, frames: int, rate: int, spec: CropSpec, bits: int, starts: int | None = None) -> CropWindow:
  """A uniform random crop of an item with `frames` samples at `rate` Hz, placed by `bits`.

  Only the first `starts` positions are drawn: the others belong to the next segment.

  Raises UserError when the item is shorter than the crop.
  """
  to_rate = rate if rate in spec.native_rates else spec.native_rates[0]
  needed = math.ceil(spec.crop_samples * rate / to_rate)
  if frames < needed:
    raise UserError(f'is shorter ({frames / rate:.3g} s) than a crop ({needed / rate:.3g} s)')
  places = frames - needed + 1
  start = below(bits, places if starts is None else max(1, min(places, starts)))
  margin = 0 if to_rate == rate else _MARGIN * math.ceil(rate / to_rate)
  first = max(0, start - margin)
  last = min(frames, start + needed + margin)
  return CropWindow(
      start=first, frames=last - first, skip=(start - first) * to_rate // rate, rate=to_rate)


def read_crop(item, *, spec: CropSpec, bits: DrawBits) -> np.ndarray:
  """One random crop of one open item (`Source.open`), read by seeking: float32 [channels, crop_samples].

  Raises UserError (one line that names the item) when it cannot be used: damaged, truncated, too
  short, NaN or infinite or absurdly large samples, a silent crop.
  """
  info, name = item.info, audio_io.shown(item.info.path)
  if info.sample_rate < _LEAST_RATE:  # the margins alone would be millions of samples
    raise UserError(f'{name}: states a sample rate of {info.sample_rate} Hz')
  try:
    window = crop_window(
        frames=info.frames, rate=info.sample_rate, spec=spec, bits=bits.offset, starts=item.starts)
  except UserError as e:
    raise UserError(f'{name}: {e}') from e
  if window.frames * info.channels > _MOST_VALUES:
    raise UserError(f'{name}: states {info.channels} channels at {info.sample_rate} Hz; a crop of that would take '
                    f'{window.frames * info.channels / 2**20:.0f} million values')
  audio = item.read(start=window.start, frames=window.frames, check_finite=True)
  audio = pick_channels(audio, channels=spec.channels, bits=bits.channel)
  if window.rate != info.sample_rate:
    audio = audio_io.resample(audio, from_rate=info.sample_rate, to_rate=window.rate)
  audio = audio[:, window.skip:window.skip + spec.crop_samples]
  level = root_mean_square(audio)
  if level < spec.rms_floor:
    raise SilentCrop(f'{name}: is silent (RMS {level:.2g}) where it was drawn')
  if level > 1 and np.abs(audio).max() > _MAX_PEAK:
    raise UserError(f'{name}: reaches {np.abs(audio).max():.4g}; float samples must be scaled to [-1, 1]')
  if spec.gain_db:
    audio = audio * np.float32(10 ** (spec.gain_db * (bits.gain / 2**63 - 1) / 20))
  return np.ascontiguousarray(audio)


class FaultLog:
  """Reports each faulty item once in the log of this process. Thread-safe.

  Uses one byte per item; after _MOST_NAMED lines no more items are reported.
  """

  def __init__(self, mixture: Mixture):
    self._lock = threading.Lock()
    self._mixture = mixture
    # For each item: the number of silent draws, and whether it was good (_GOOD) or was reported (_NAMED).
    self._states = [np.zeros(count, np.uint8) for count in mixture.counts]
    self._named = 0
    self._closed = False

  def __reduce__(self):
    return FaultLog, (self._mixture,)  # a worker process has its own

  def good(self, source: int, item: int):
    self._states[source][item] |= _GOOD

  def fault(self, source: int, item: int, error: UserError):
    with self._lock:
      state = int(self._states[source][item])
      if isinstance(error, SilentCrop):
        if state >= _SILENT_DRAWS:  # already reported, or was good
          return
        self._states[source][item] = state = state + 1
        if state < _SILENT_DRAWS:
          return
        error = UserError(f'{self._mixture.sources[source].name(item)}: was silent in each of its first '
                          f'{_SILENT_DRAWS} draws')
      elif state & _NAMED:
        return
      else:
        self._states[source][item] |= _NAMED
      self._named += 1
      if self._closed or self._named > _MOST_NAMED:
        return
      logging.warning('training data: %s', error)
      if self._named == _MOST_NAMED:
        logging.warning('training data: these are %d; further ones are not named', _MOST_NAMED)

  def close(self):
    """Stops reporting: the files of running reads may be deleted now."""
    with self._lock:
      self._closed = True


@dataclasses.dataclass
class RandomCrop:
  """The training sample at a global index: `self(index) -> {'audio', 'rejected'}`.

  The first attempt takes its item from the epoch's shuffle (`order.Order`), so every item of a source
  once in an epoch of it; when that draw is rejected, item and offset are drawn anew from (seed, index,
  attempt), in the same source. Thus the sample is a pure function of (seed, index, sources, weights).

  With spec.mix another crop, of any item of a source drawn by weight, is added to some samples.

  Returns a dict: 'audio' float32 [channels, crop_samples]; 'rejected' int32 [], the number of
  rejected draws. Raises UserError after MAX_ATTEMPTS rejected draws in a row.
  """

  mixture: Mixture
  spec: CropSpec
  seed: int
  order: Order = dataclasses.field(init=False)
  faults: FaultLog = dataclasses.field(init=False)

  def __post_init__(self):
    self.order = Order(counts=self.mixture.counts, weights=self.mixture.weights, seed=self.seed)
    self.faults = FaultLog(self.mixture)

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    (audio, rejected, _), *others = self._parts(index)
    for other, more, _ in others:
      audio, rejected = np.clip(audio + other, -1, 1), rejected + more
    return {'audio': audio, 'rejected': np.asarray(rejected, np.int32)}

  def origin(self, index: int) -> str:
    """The name of the item that a sample is of; of two, where it is a sum."""
    return ' + '.join(name for _, _, name in self._parts(index))

  def _parts(self, index: int) -> list[tuple[np.ndarray, int, str]]:
    """What `_draw` gives for the crop, and for the one that is added to it, if any."""
    parts = [self._draw(index, *self.order(index))]
    if self.spec.mix:
      chance, which = partner_bits(seed=self.seed, index=index)
      if chance < self.spec.mix * 2**64:
        parts.append(self._draw(index, self.order.source_of(which), None, partner=True))
    return parts

  def check(self):
    """Draws a crop of each source. Raises UserError if a source has no usable crop."""
    for source in range(len(self.mixture.sources)):
      self._draw(0, source, None)

  def _draw(self, index: int, source: int, item: int | None, *, partner=False) -> tuple[np.ndarray, int, str]:
    """(crop, number of rejected draws, its item's name): the first draw is of `item`, all others of random items."""
    items, reasons = self.mixture.sources[source], deque[str](maxlen=3)
    for attempt in range(MAX_ATTEMPTS):
      bits = draw_bits(seed=self.seed, index=index, attempt=attempt, partner=partner)
      if attempt or item is None:
        item = below(bits.file, len(items))
      try:
        with items.open(item) as audio:
          crop = read_crop(audio, spec=self.spec, bits=bits)
      except UserError as e:
        self.faults.fault(source, item, e)
        if str(e) not in reasons:
          reasons.append(str(e))
        continue
      self.faults.good(source, item)
      return crop, attempt, items.name(item)
    raise UserError(f'{items.place}: {MAX_ATTEMPTS} draws in a row gave no crop to train on; the last reasons: '
                    f'{"; ".join(reasons)}')
