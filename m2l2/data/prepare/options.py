"""The options of a job, the limits of decoding, and the data that its work items need."""

import dataclasses

from m2l2.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
  """The options that determine the output, together with the files.

  Attributes:
    segment_seconds: length of a segment, at its rate.
    overlap_seconds: the longest crop that is inside one segment, wherever it begins.
    rates: Hz; files at these are stored as they are, others resampled to the first.
    validation_fraction: of the files, by a hash of their names.
    silence_dbfs: segments below are left out. At -72 no crop above training's rms_floor of 1e-3 is lost: a crop of
      1.5 s at -60 dBFS raises 20 s of silence to -71.3.
    shard_minutes: of audio, about.
  """

  segment_seconds: float = 20.
  overlap_seconds: float = 2.
  rates: tuple[int, ...] = (44100, 48000)
  validation_fraction: float = 0.05
  silence_dbfs: float = -72.
  shard_minutes: float = 30.

  def __post_init__(self):
    if not 0 <= self.overlap_seconds < self.segment_seconds <= 600:
      raise UserError(f'--segment-seconds={self.segment_seconds:g} --overlap-seconds={self.overlap_seconds:g}: '
                      'segments must be longer than their overlap, and at most 600 s')
    if not self.rates or not all(8000 <= rate <= 192_000 for rate in self.rates):
      raise UserError(f'--rates={",".join(map(str, self.rates))}: give one or more from 8000 to 192000')
    if not 0 <= self.validation_fraction <= 1:
      raise UserError(f'--validation-fraction={self.validation_fraction:g}: it must be from 0 to 1')
    if not self.shard_minutes > 0:
      raise UserError(f'--shard-minutes={self.shard_minutes:g}: it must be positive')


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of decoding: seconds without a block of audio; bytes of address space."""

  timeout: float = 60.
  memory: int = 2**30


@dataclasses.dataclass(frozen=True)
class Preparation:
  """The data that work items need; pickled to the workers."""

  base: str
  output: str
  options: Options
  limits: Limits
