"""The pages: README is short, every folder has one, links lead somewhere, commands name what is there."""

from pathlib import Path
import re

import pytest
from test_layering import ROOT

PAGES = sorted(path for path in ROOT.rglob('*.md')
               if not {part for part in path.relative_to(ROOT).parts[:-1]} & {'data', 'runs', 'build', 'node_modules'}
               and not any(part.startswith('.venv') for part in path.parts)
               or path.parent == ROOT / 'm2l2' / 'data')
PAGES_OF_FOLDERS = [path for path in PAGES if path.name == 'README.md' and path.parent != ROOT]
TABLES_MAY_BE_WIDE = {'figures.md', 'learning.md', 'MODEL.md'}
MOST_FILES_WITHOUT_A_PAGE = 3
# Their files are data, or the page of the folder above tells of them.
WITHOUT_A_PAGE = ('m2l2/assets', 'm2l2/evaluation/', 'm2l2/data/prepare', 'm2l2/data/containers', 'm2l2/interop/',
                  'tests/goldens', 'tests/conformance/', 'launch/research/excerpts')


def name(path):
  return path.relative_to(ROOT).as_posix()


def test_the_readme_is_short():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  assert len(text.splitlines()) <= 200 and len(text.encode()) <= 11 * 1024
  assert 'What it is not yet' in text[:2000]


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_cells_are_short(page):
  if page.name in TABLES_MAY_BE_WIDE:
    return
  for line in page.read_text(encoding='utf-8').splitlines():
    if line.startswith('|'):
      assert all(len(cell.strip()) <= 120 for cell in line.split('|')), line


@pytest.mark.parametrize('page', PAGES_OF_FOLDERS, ids=name)
def test_pages_of_folders_are_of_a_size(page):
  assert 20 <= len(page.read_text(encoding='utf-8').splitlines()) <= 80


def test_every_folder_has_a_page():
  missing = []
  for top in ('m2l2', 'configs', 'launch', 'tests', 'colabs'):
    for folder in [ROOT / top, *(path for path in (ROOT / top).rglob('*') if path.is_dir())]:
      files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith('.')]
      if ('__pycache__' not in folder.parts and len(files) > MOST_FILES_WITHOUT_A_PAGE
          and not f'{name(folder)}/'.startswith(WITHOUT_A_PAGE) and not (folder / 'README.md').is_file()):
        missing.append(name(folder))
  assert missing == []


def anchors(text):
  headings = re.findall(r'^#+ (.*)$', text, flags=re.M)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings} | set(
      re.findall(r'<a id="([\w-]+)"', text))


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_lead_somewhere(page):
  text = page.read_text(encoding='utf-8')
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'https?:|mailto:', target):
      continue
    path, _, anchor = target.partition('#')
    place = (page.parent / path).resolve() if path else page
    assert place.exists(), f'{name(page)}: {target}'
    if anchor and place.suffix == '.md':
      assert anchor in anchors(place.read_text(encoding='utf-8')), f'{name(page)}: {target}'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_files_that_pages_name_are_there(page):
  """`launch/...`, `tests/...`, `configs/...` and `m2l2/...` in code and text."""
  text = page.read_text(encoding='utf-8')
  for path in re.findall(r'(?<![\w/.-])((?:launch|tests|configs|m2l2)/[\w./-]*\w\.(?:py|sh|md|txt|yaml))', text):
    assert 'NAME' in path or page.name == 'CHANGELOG.md' or (ROOT / path).exists(), f'{name(page)}: {path}'


def commands_of(page):
  """Lines of `m2l2 COMMAND --option=...` in blocks of code, continued lines joined."""
  for block in re.findall(r'```bash\n(.*?)```', page.read_text(encoding='utf-8'), flags=re.S):
    for line in block.replace('\\\n', ' ').splitlines():
      line = line.partition('   #')[0].partition(' #')[0].strip()
      if line.startswith('m2l2 '):
        yield line


def test_options_that_pages_name_exist():
  from m2l2 import cli
  parser = cli._parser()
  commands = next(action.choices for action in parser._actions if hasattr(action, 'choices') and action.choices)
  checked = 0
  for page in PAGES:
    for line in commands_of(page):
      words = line.split()
      if words[1] not in commands:
        assert words[1].startswith('--'), f'{name(page)}: {line}'
        continue
      if words[1] in ('train', 'plan'):
        continue  # fields of the config
      known = {option for action in commands[words[1]]._actions for option in action.option_strings}
      for option in re.findall(r'(?<= )--[\w-]+', line):
        assert option in known, f'{name(page)}: {line}'
        checked += 1
  assert checked > 20


def test_paths_are_of_pages():
  assert Path('README.md') in {path.relative_to(ROOT) for path in PAGES} and len(PAGES_OF_FOLDERS) >= 15
