"""Audio files in and out, and resampling: what others import. `reader`, `writer` and `resampling` do the work.

Audio is float32 `[channels, samples]`, nominally in [-1, 1] (lossy and float files may exceed it); the channels are in
WAV's order (5.1: left, right, centre, LFE, back left, back right), whatever the format's own is.
Readable: what libsndfile reads (WAV, FLAC, OGG Vorbis, Opus, MP3, AIFF, ...), and FLAC inside OGG. Every failure that a
user can mend is a `UserError` of one line that begins with the path.

Seeking is exact: a read at `start` gives the very samples of the whole file's read, bit for bit
(MP3 here and there: within 1e-7; Opus: as a rule within 1e-7, in a file of three channels 2e-3 was seen), for every
format above, whoever wrote it. Streams one after the other in a file
(`cat a.ogg b.ogg`) are read as one, as far as rate and channels stay. What a file lacks of what its
header promises, or what of it cannot be read, is named once in the log, with seconds.
"""

from m2l2.data.paths import shown
from m2l2.data.reader import AudioInfo, AudioReader, probe, RATES, read, read_blocks, READABLE, TAGS
from m2l2.data.resampling import resample, resampled_length, StreamResampler
from m2l2.data.streams import decode_bytes, read_bytes
from m2l2.data.writer import AudioWriter, check_writable, flac_bytes, write, WRITE_FORMATS

__all__ = [
    'AudioInfo', 'AudioReader', 'AudioWriter', 'RATES', 'READABLE', 'StreamResampler', 'TAGS', 'WRITE_FORMATS',
    'check_writable', 'decode_bytes', 'flac_bytes', 'probe', 'read', 'read_blocks', 'read_bytes', 'resample',
    'resampled_length', 'shown', 'write']
