"""Music that travels: the pack, and the script that trains from it."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import soak_resume

from launch.research import pack
from m2l2.codec import codec
from m2l2.data import audio_io
from m2l2.data.order import split_of
from m2l2.errors import UserError

SCRIPT = soak_resume.REPOSITORY / 'launch' / 'research' / 'train_small.sh'


def test_time_is_shared_out_by_weight_and_what_one_lacks_goes_to_the_others():
  assert pack.level({'a': 10, 'b': 100, 'c': 100}, 70, {'a': 1, 'b': 1, 'c': 1}) == {'a': 10, 'b': 30, 'c': 30}
  assert pack.level({'a': 90, 'b': 90}, 60, {'a': 1, 'b': .5}) == pytest.approx({'a': 40, 'b': 20})
  assert pack.level({'a': 5, 'b': 7}, 60, {'a': 1, 'b': 1}) == {'a': 5, 'b': 7}
  assert pack.level({'a': 5, 'b': 7}, 60, {'a': 1, 'b': 0}) == {'a': 5, 'b': 0}


@pytest.fixture
def music(tmp_path):
  """Two folders, of one long and of three short files, one of which is put aside; something unreadable."""
  place = tmp_path / 'music'
  names = [name for name in (f'short/{i}.wav' for i in range(100)) if split_of(name, .3) == 'train'][:2]
  aside = next(name for name in (f'short/{i}.wav' for i in range(100)) if split_of(name, .3) != 'train')
  long = next(name for name in (f'long/{i}.flac' for i in range(100)) if split_of(name, .3) == 'train')
  rng = np.random.default_rng(0)
  for name, seconds in ((long, 40), *((name, 8) for name in (*names, aside))):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(seconds * 44100) / 44100
    tone = .3 * np.sin(2 * np.pi * 440 * t) + .01 * rng.normal(size=(2, t.size))
    audio_io.write(place / name, np.float32(tone), 44100)
  (place / 'long' / 'broken.wav').write_bytes(b'RIFF no')
  return place, {'long': [long], 'short': names}, aside


def test_a_pack_holds_the_middle_of_each_file_at_its_size(music, tmp_path, capsys):
  place, kept, aside = music
  output = tmp_path / 'packs' / 'one'
  pack.main([f'--input={place}', f'--output={output}', '--hours=0.01', '--megabytes=0.2', '--leave-out=0.3'])
  said = capsys.readouterr()
  assert '3 files, 0.01 h, 41 kbit/s' in said.out
  about = json.loads((output / 'pack.json').read_text())
  rows = {row['source']: row for row in about['files']}
  assert sorted(rows) == sorted(name for names in kept.values() for name in names) and aside not in rows
  assert [rows[name]['seconds'] for name in kept['short']] == [8, 8]  # 18 s of each folder were asked for
  [long] = kept['long']
  assert rows[long]['seconds'] == pytest.approx(20, abs=.01) and rows[long]['start'] == pytest.approx(10, abs=.01)
  for name, row in rows.items():
    audio, rate = audio_io.read(output / f'{name}.opus')
    assert rate == 48000 and audio.shape == (1, round(row['seconds'] * 48000))
    spectrum = np.abs(np.fft.rfft(audio[0, 48000:96000]))
    assert np.argmax(spectrum) == 440 and .15 < spectrum[440] / 24000 < .35
  size = sum(file.stat().st_size for file in output.rglob('*.opus'))
  assert .5 * .2e6 < size < .2e6
  assert 'broken.wav' in said.err or split_of('long/broken.wav', .3) != 'train'
  with pytest.raises(UserError, match='is there already'):
    pack.main([f'--input={place}', f'--output={output}'])


@pytest.mark.parametrize('flags, says', [
  (['--hours=0'], '--hours=0: it must be more than 0'),
  (['--leave-out=1'], '--leave-out=1: it must be'),
  (['--megabytes=0.01'], 'and Opus needs 6'),
  (['--shares=long=a'], "'long=a' must be FOLDER=WEIGHT"),
  (['--shares=other=1'], "no folder 'other' of music: it is one of long, short"),
])
def test_a_pack_that_cannot_be_is_one_line_and_leaves_nothing(flags, says, music, tmp_path):
  with pytest.raises(UserError, match='^[^\n]*$') as error:
    pack.main([f'--input={music[0]}', f'--output={tmp_path}/packs/one', *flags])
  assert says in str(error.value) and not list(tmp_path.glob('packs/*'))


def test_no_music_is_one_line(tmp_path):
  with pytest.raises(UserError, match='is not a folder'):
    pack.main([f'--input={tmp_path}/none', f'--output={tmp_path}/one'])
  with pytest.raises(UserError, match='no readable music of 5 s or more there'):
    pack.main([f'--input={tmp_path}', f'--output={tmp_path}/one'])


def script(*arguments, environment=None, timeout=60):
  return subprocess.run(['bash', SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False,
                        timeout=timeout)


def test_what_train_small_would_do(tmp_path):
  done = script('--dry-run', f'--workdir={tmp_path}/w', f'--pack={tmp_path}/p', '--minutes=9', '--', '--config.seed=3')
  packs, trains, ships = (shlex.split(line) for line in done.stdout.splitlines())
  assert [call[1] for call in (packs, ships)] == ['launch/research/pack.py', 'launch/research/ship.py']
  assert trains[:4] == ['timeout', '--preserve-status', '--signal=TERM', '9m'] and '--config.seed=3' in trains
  for wrong, says in (('--minutes=x', 'a whole number of minutes'), ('--pac=x', 'does not know --pac=x')):
    done = script(wrong)
    assert done.returncode == 1 and says in done.stderr
  nothing = [f'--pack={tmp_path}/p', f'--music={tmp_path}/m', f'--workdir={tmp_path}/w']
  done = script(f'--python={sys.executable}', *nothing)
  assert done.returncode == 1 and 'run ./launch/get_music.sh first' in done.stderr


def test_a_gpus_quarter_of_an_hour_says_what_it_lacks(tmp_path):
  def quarter(*arguments):
    return subprocess.run(['bash', SCRIPT.parent / 'gpu_quarter.sh', *arguments], capture_output=True, text=True,
                          check=False, timeout=60)

  assert quarter('--help').stdout.startswith('Nine minutes on one GPU')
  for wrong, says in (('--minutes=0', 'a whole number of minutes'), (f'--pack={tmp_path}/no', 'no is no pack'),
                      ('--pac=x', 'does not know --pac=x')):
    done = quarter(wrong, f'--output={tmp_path}/out')
    assert done.returncode == 1 and says in done.stderr and not (tmp_path / 'out').exists()


@pytest.mark.soak
def test_train_small_goes_from_a_pack_to_a_model(music, tmp_path):
  output = tmp_path / 'pack'
  pack.main([f'--input={music[0]}', f'--output={output}', '--hours=0.01', '--megabytes=0.2', '--leave-out=0.3'])
  small = [f'--config.{name}={value}' for name, value in soak_resume.SMALL.items()]
  run = [f'--python={sys.executable}', f'--pack={output}', f'--workdir={tmp_path}/w', '--config=configs/small.py:debug',
         '--', *small, '--config.train.steps=2']
  done = script(*run, environment=soak_resume.environment(tmp_path / 'cache'), timeout=300)
  assert done.returncode == 0, done.stderr
  model = codec.load(tmp_path / 'w' / 'box' / 'small')
  assert model.config['train']['steps'] == 2 and model.config['train']['init_from'] == ''
  assert [line['step'] for line in soak_resume.trace(tmp_path / 'w')] == [1, 2]
