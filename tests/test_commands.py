"""The commands of all READMEs: quick ones run here as they are written; launch/bench/commands.md lists the others."""

import re
import shlex
import shutil

import pytest
import soundfile
from test_pages import PAGES, ROOT, name

from m2l2 import assets, cli
from m2l2.data import audio_io

LIST = ROOT / 'launch' / 'bench' / 'commands.md'


def blocks(page, language='bash'):
  return re.findall(rf'```{language}\n(.*?)```', page.read_text(encoding='utf-8'), flags=re.S)


def commands(block):
  """The lines of a block of shell, continued ones joined, without their comments."""
  lines = (re.sub(r'\s+#.*', '', line) for line in re.sub(r'\\\n\s*', '', block).splitlines())
  return [line.strip() for line in lines if line.strip()]


def everything():
  return {command: name(page) for page in PAGES for block in blocks(page) for command in commands(block)}


def is_quick(command, page):
  """Whether it runs here: encoding and decoding of the first page; of training, whether the command line is right."""
  return page == 'README.md' and (
      re.match('m2l2 (encode|decode|reconstruct|info|similar|train) ', command) and 'codicodec' not in command)


def listed():
  """{command: what the list says of it} of launch/bench/commands.md: lines `- DATE, RESULT: COMMAND`."""
  lines = re.findall(r'^- (.*?): `(.+)`$', LIST.read_text(encoding='utf-8'), flags=re.M)
  assert len(lines) == len(dict((command, said) for said, command in lines)), 'a command is listed twice'
  return {command: said for said, command in lines}


def test_every_command_is_run_here_or_listed_and_nothing_else_is_listed():
  slow = {command for command, page in everything().items() if not is_quick(command, page)}
  assert slow and set(listed()) == slow


@pytest.mark.parametrize('command', sorted(listed()))
def test_the_list_says_when_it_was_run_or_why_not(command):
  assert re.match(r'\d{1,2} \w{3} 20\d\d, .|not run, .', listed()[command])


@pytest.fixture
def clone(tmp_path, monkeypatch):
  """A folder in which what the first page calls the reader's own is there: a second of music each."""
  audio, rate = audio_io.read(assets.TRAINING, frames=44100)
  for folder in ('albums/first', 'MUSIC'):
    (tmp_path / folder).mkdir(parents=True)
    audio_io.write(tmp_path / folder / 'song.flac', audio, rate)
  soundfile.write(tmp_path / 'song.mp3', audio.T, rate, format='MP3')
  shutil.copytree(tmp_path / 'MUSIC', tmp_path / 'data' / 'prepared')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_the_quick_commands_run_as_they_are_written(clone, capsys):
  [python] = blocks(ROOT / 'README.md', 'python')
  exec(compile(python, 'README.md', 'exec'), {})
  assert 'Latents' in capsys.readouterr().out and (clone / 'clip.wav').stat().st_size > 44100
  ran = 0
  for command, page in everything().items():
    if is_quick(command, page):
      words = shlex.split(command)[1:]
      assert cli.main(words + ['--check=config'] * (words[0] == 'train')) == 0, command
      ran += 1
  assert ran == 8 and (clone / 'reconstruction.wav').is_file() and (clone / 'latents/first/song.safetensors').is_file()
