"""Reading and writing audio files, and resampling: re-exports `reader`, `writer` and `resampling`.

Audio is float32 `[channels, samples]`, nominally in [-1, 1] (lossy and float files may exceed it); the channels are in
WAV's order (5.1: left, right, centre, LFE, back left, back right) for every format.
Readable: what libsndfile reads (WAV, FLAC, OGG Vorbis, Opus, MP3, AIFF, ...), and FLAC inside OGG. Every failure that a
user can correct is a `UserError` of one line that begins with the path.

Seeking is exact for every format above: a read at `start` returns the same samples as a read of the whole file, bit for
bit (MP3: at some places within 1e-7; Opus: usually within 1e-7, in one file of three channels 2e-3 was seen). Chained
streams (`cat a.ogg b.ogg`) are read as one if rate and channels are equal. Audio that the header states but that is
missing or cannot be decoded is reported once in the log, in seconds.
"""

from m2l2.data.paths import shown
from m2l2.data.reader import RATES, READABLE, TAGS, AudioInfo, AudioReader, info, read, read_blocks
from m2l2.data.resampling import StreamResampler, resample, resampled_length
from m2l2.data.streams import decode_bytes, read_bytes
from m2l2.data.writer import WRITE_FORMATS, AudioWriter, check_writable, file_bytes, write

__all__ = [
    'AudioInfo', 'AudioReader', 'AudioWriter', 'RATES', 'READABLE', 'StreamResampler', 'TAGS', 'WRITE_FORMATS',
    'check_writable', 'decode_bytes', 'file_bytes', 'info', 'read', 'read_blocks', 'read_bytes', 'resample',
    'resampled_length', 'shown', 'write']

probe, flac_bytes = info, file_bytes  # their names before
