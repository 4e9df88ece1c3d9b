"""From a file to one training crop: pure functions of (seed, index) and of the files.

Random numbers are raw 64-bit words of Philox, a counter-based generator. Its words are fixed by
definition, so the order of samples outlives versions of NumPy and of Grain.
"""

from collections import deque
import dataclasses
import functools
import math
import threading

from absl import logging
import numpy as np

from m2l2.data import audio_io
from m2l2.data.sources import AudioFiles
from m2l2.errors import UserError

MAX_ATTEMPTS = 64

# soxr HQ's filter reaches 128 samples of the lower rate to each side (the error of a piece cut from
# the middle falls to float32 rounding, 5e-7, there); twice that is read around a crop.
_MARGIN = 256

# A float file scaled to integers (peak 32768) would wreck a run; loud lossy files reach about 2.
_MAX_PEAK = 100.0

# A file is named as silent when its first draws in this process were all silent.
_SILENT_DRAWS = 4


@dataclasses.dataclass(frozen=True)
class CropSpec:
  """What a training crop is.

  Attributes:
    crop_samples: its length.
    channels: 1 (a random channel of the file) or 2 (see `pick_channels`).
    native_rates: Hz; files at these rates are fed as they are, others resampled to the first.
    rms_floor: crops below this RMS (full scale is 1) are rejected as silent.
  """

  crop_samples: int
  channels: int
  native_rates: tuple[int, ...]
  rms_floor: float


@dataclasses.dataclass(frozen=True)
class DrawBits:
  """Three uniform 64-bit words that decide one draw."""

  file: int
  offset: int
  channel: int


@dataclasses.dataclass(frozen=True)
class CropWindow:
  """Where a crop lies: read [start, start + frames) of the file, drop `skip` samples after
  resampling to `rate`, keep the crop."""

  start: int
  frames: int
  skip: int
  rate: int


class SilentCrop(UserError):
  """A crop below the RMS floor: no fault of its file."""


@functools.lru_cache(maxsize=4)
def epoch_order(*, seed: int, epoch: int, count: int) -> np.ndarray:
  """The permutation of `count` files in an epoch, int64 [count]; a pure function.

  Grain's own shuffle is not used: below some thousand files its index cipher walks in circles, for
  2-6 ms a sample (12 or 4 files) with the interpreter locked, more than reading the crop takes.
  """
  # The third counter word keeps these words apart from those of `draw_bits`.
  return np.argsort(_philox([seed, epoch], [0, 0, 1, 0]).random_raw(count), kind='stable')


def draw_bits(*, seed: int, index: int, attempt: int) -> DrawBits:
  """The random words of one draw; a pure function of its arguments (each < 2**64)."""
  words = _philox([seed, index], [0, 0, 0, attempt]).random_raw(3)
  file, offset, channel = words.tolist()
  return DrawBits(file=file, offset=offset, channel=channel)


def _philox(key: list[int], counter: list[int]) -> np.random.Philox:
  # Arrays, for NumPy would take a list with a word above 2**63 through float64.
  return np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))


def below(bits: int, limit: int) -> int:
  """A uniform integer in [0, limit) from a uniform 64-bit word."""
  return bits * limit >> 64


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


def crop_window(*, frames: int, rate: int, spec: CropSpec, bits: int) -> CropWindow:
  """A uniform random crop of a file with `frames` samples at `rate` Hz, placed by `bits`.

  Raises UserError when the file is shorter than the crop.
  """
  to_rate = rate if rate in spec.native_rates else spec.native_rates[0]
  needed = math.ceil(spec.crop_samples * rate / to_rate)
  if frames < needed:
    raise UserError(f'is shorter ({frames / rate:.3g} s) than a crop ({needed / rate:.3g} s)')
  start = below(bits, frames - needed + 1)
  margin = 0 if to_rate == rate else _MARGIN * math.ceil(rate / to_rate)
  first = max(0, start - margin)
  last = min(frames, start + needed + margin)
  return CropWindow(
      start=first, frames=last - first, skip=(start - first) * to_rate // rate, rate=to_rate)


def read_crop(path, *, spec: CropSpec, bits: DrawBits) -> np.ndarray:
  """One random crop of one file, read by seeking: float32 [channels, crop_samples].

  Raises UserError (one line that names the file) when it cannot be used: unreadable, truncated,
  too short, NaN or infinite or absurdly large samples, a silent crop.
  """
  with audio_io.AudioReader(path) as reader:
    info = reader.info
    try:
      window = crop_window(
          frames=info.frames, rate=info.sample_rate, spec=spec, bits=bits.offset)
    except UserError as e:
      raise UserError(f'{audio_io.shown(path)}: {e}') from e
    audio = reader.read(start=window.start, frames=window.frames, check_finite=True)
  audio = pick_channels(audio, channels=spec.channels, bits=bits.channel)
  if window.rate != info.sample_rate:
    audio = audio_io.resample(audio, from_rate=info.sample_rate, to_rate=window.rate)
  audio = audio[:, window.skip:window.skip + spec.crop_samples]
  level = root_mean_square(audio)
  if level < spec.rms_floor:
    raise SilentCrop(f'{audio_io.shown(path)}: is silent (RMS {level:.2g}) where it was drawn')
  if level > 1 and np.abs(audio).max() > _MAX_PEAK:
    raise UserError(
        f'{audio_io.shown(path)}: reaches {np.abs(audio).max():.4g}; float samples must be scaled '
        'to [-1, 1]')
  return np.ascontiguousarray(audio)


class FaultLog:
  """Names each faulty file once in the log of this process. Threads may share it."""

  def __init__(self):
    self._lock = threading.Lock()
    self._named = set()
    self._silent = {}
    self._closed = False

  def __reduce__(self):
    return FaultLog, ()  # a worker process keeps its own

  def good(self, path: str):
    with self._lock:
      self._silent[path] = -1

  def fault(self, path: str, error: UserError):
    with self._lock:
      if isinstance(error, SilentCrop):
        count = self._silent.get(path, 0)
        self._silent[path] = count + (count >= 0)
        if self._silent[path] != _SILENT_DRAWS:
          return
        error = f'{audio_io.shown(path)}: was silent in each of its first {_SILENT_DRAWS} draws'
      elif path in self._named:
        return
      self._named.add(path)
      if not self._closed:
        logging.warning('training data: %s', error)

  def close(self):
    """Says no more: reads still under way may find their files gone."""
    with self._lock:
      self._closed = True


@dataclasses.dataclass(frozen=True)
class RandomCrop:
  """The training sample at a global index: `self(index) -> {'audio', 'rejected'}`.

  The first attempt takes its file from the epoch's shuffle, so every file once an epoch; when that
  draw is rejected, file and offset are drawn anew from (seed, index, attempt). Thus the sample is a
  pure function of (seed, index, sorted files).

  Returns a dict: 'audio' float32 [channels, crop_samples]; 'rejected' int32 [], the number of
  rejected draws. Raises UserError after MAX_ATTEMPTS rejected draws in a row.
  """

  files: AudioFiles
  spec: CropSpec
  seed: int
  faults: FaultLog = dataclasses.field(default_factory=FaultLog)

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    epoch, place = divmod(index, len(self.files))
    number = epoch_order(seed=self.seed, epoch=epoch, count=len(self.files))[place]
    reasons = deque(maxlen=3)
    for attempt in range(MAX_ATTEMPTS):
      bits = draw_bits(seed=self.seed, index=index, attempt=attempt)
      if attempt:
        number = below(bits.file, len(self.files))
      path = self.files.path(number)
      try:
        audio = read_crop(path, spec=self.spec, bits=bits)
      except UserError as e:
        self.faults.fault(path, e)
        if str(e) not in reasons:
          reasons.append(str(e))
        continue
      self.faults.good(path)
      return {'audio': audio, 'rejected': np.int32(attempt)}
    raise UserError(
        f'{audio_io.shown(self.files.base or ".")}: {MAX_ATTEMPTS} draws in a row gave no crop to '
        f'train on; the last reasons: {"; ".join(reasons)}')
