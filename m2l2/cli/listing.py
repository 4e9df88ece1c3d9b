"""configs, models: lists of the presets and of the models in the box."""

import ast
import os

from m2l2 import configs
from m2l2.cli import terminal

_IN_SHORT = '**In short.** '  # begins the paragraph of a card with quality and licence


def add(command):
  command('configs', _configs, summary='The presets, with a line each.',
          example='  m2l2 configs\n  m2l2 train --config=clip --config.data.root=song.flac --workdir=runs/clip')
  command('models', _models, summary='The models in the box: rate, size, quality, licence, and their cards.',
          example='  m2l2 models\n  m2l2 reconstruct song.flac again.wav --checkpoint=tiny')


def _configs(args):
  folder, lines = configs.__path__[0], {}
  for name in sorted(os.listdir(folder)):
    if name.endswith('.py') and name != '__init__.py':
      with open(os.path.join(folder, name), encoding='utf-8') as file:  # read, not run: that needs the train extra
        text = ast.get_docstring(ast.parse(file.read())) or ''
      lines[name.removesuffix('.py')] = ' '.join(text.split('\n\n')[0].split())
  _table(lines)


def _models(args):
  from m2l2.codec import loading
  lines = {}
  for name, place in loading.in_the_box().items():
    size = sum(entry.stat().st_size for entry in os.scandir(place) if entry.name.endswith('.safetensors'))
    with open(os.path.join(place, 'MODEL.md'), encoding='utf-8') as file:
      paragraphs = [' '.join(paragraph.split()) for paragraph in file.read().split('\n\n')]
    short = next((text.removeprefix(_IN_SHORT) for text in paragraphs if text.startswith(_IN_SHORT)), '')
    facts = f'{paragraphs[1].partition(". ")[0]}; {size / 2 ** 20:.0f} MiB'
    lines[name] = '\n'.join(filter(None, [facts, short, f'Card: {os.path.join(place, "MODEL.md")}']))
  _table(lines)


def _table(lines):
  width = max(map(len, lines))
  for name, line in lines.items():
    terminal.show(f'{name:{width}}  ' + line.replace('\n', '\n' + ' ' * (width + 2)))
