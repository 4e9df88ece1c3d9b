"""Decoding of formats that libsndfile does not read (M4A, AAC, WMA, ...) by FFmpeg through PyAV (extra `av`)."""

from collections.abc import Mapping
import dataclasses
from typing import BinaryIO

from m2l2.errors import UserError, in_one_line

EXTENSIONS = ('.m4a', '.mp4', '.m4b', '.aac', '.wma', '.mka', '.webm')
_TAGS = {'track': 'tracknumber'}  # FFmpeg's names -> libsndfile's, where they differ


@dataclasses.dataclass(frozen=True)
class Decoded:
  """Facts about a decoded file. Attributes: sample_rate in Hz; channels; codec: FFmpeg's name; tags: text by name."""
  sample_rate: int
  channels: int
  codec: str
  tags: Mapping[str, str]


def decode(path, out: BinaryIO, *, name: str) -> Decoded:
  """Decodes the first audio stream of a file into `out`, as raw float32, samples interleaved.

  `name` is the name of the file in errors. Raises UserError: PyAV is not installed, no audio, damaged.
  """
  try:
    import av
  except ModuleNotFoundError as error:
    raise UserError(f"{name}: reading such a file needs av, which is not installed: pip install 'm2l2[av]'; or convert "
                    'it to FLAC first') from error
  try:
    with av.open(path) as container:
      if not container.streams.audio:
        raise UserError(f'{name}: holds no audio')
      stream = container.streams.audio[0]
      resampler = av.AudioResampler(format='flt', layout=stream.layout, rate=stream.rate)  # the rate stays
      for frame in container.decode(stream):
        for packed in resampler.resample(frame):
          out.write(packed.to_ndarray().tobytes())
      for packed in resampler.resample(None):
        out.write(packed.to_ndarray().tobytes())
      tags = {_TAGS.get(key.lower(), key.lower()): text for key, text in container.metadata.items()}
      return Decoded(sample_rate=stream.rate, channels=stream.layout.nb_channels, codec=stream.codec_context.name,
                     tags=tags)
  except (av.FFmpegError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'{name}: is not audio that can be read here ({in_one_line(error)})') from error
