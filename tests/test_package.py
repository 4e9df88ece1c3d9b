"""The package: light by default, everything imported is declared, nothing stray at the root."""

import configparser
import importlib.metadata
from pathlib import Path
import re
import runpy
import stat
import subprocess
import sys
import tomllib
import zipfile

import pytest
from test_layering import INFERENCE, LAZY, ROOT, reached, read_house
import yaml

import m2l2

# What `pip install m2l2` must never pull in by our own wish.
HEAVY = {'apache-beam', 'av', 'clu', 'codicodec', 'grain', 'onnxruntime', 'optax',
         'orbax-checkpoint', 'tensorboard', 'tensorflow', 'tensorflow-cpu', 'tensorflow-datasets',
         'torch'}
EXTRAS = {'av', 'beam', 'codicodec', 'cuda', 'dev', 'eval', 'tensorboard', 'tpu', 'train'}
# Distributions by what is imported from them, where the two differ.
DISTRIBUTIONS = {'absl': 'absl-py', 'apache_beam': 'apache-beam', 'orbax': 'orbax-checkpoint',
                 'ml_collections': 'ml-collections', 'tensorflow_datasets': 'tensorflow-datasets',
                 'sklearn': 'scikit-learn', 'visqol': 'visqol-python'}
AT_ROOT = {'CITATION.cff', 'LICENSE', 'README.md', 'colabs', 'configs', 'launch', 'm2l2',
           'pyproject.toml', 'setup.cfg', 'setup.py', 'tests'}
MADE = {'build', 'data', 'dist', 'm2l2.egg-info', 'runs'}  # by tools and by use; git ignores them

SETUP = configparser.ConfigParser(interpolation=None, comment_prefixes='#')
SETUP.read(ROOT / 'setup.cfg')


def listed(section, option):
  return [line for line in SETUP[section][option].split('\n') if line]


def names(requirements):
  return {re.match(r'[\w.-]+', line)[0] for line in requirements}


def extras():
  return {name: listed('options.extras_require', name) for name in SETUP['options.extras_require']}


def third_parties(house):
  tops = {item.name.partition('.')[0] for imports in house.values() for item in imports}
  tops -= {*sys.stdlib_module_names, 'm2l2'}
  return {DISTRIBUTIONS.get(top, top) for top in tops}


def test_the_light_install_is_light():
  light = names(listed('options', 'install_requires'))
  assert {'jax', 'flax', 'numpy', 'safetensors', 'soundfile', 'soxr'} <= light
  assert not light & HEAVY


def test_extras():
  assert EXTRAS <= set(extras())
  train = names(extras()['train']) | names(listed('options', 'install_requires'))
  assert {'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets', 'ml-collections', 'clu'} <= train
  assert not names(extras()['train']) & {'tensorflow', 'tensorflow-cpu', 'torch'}


def test_jax_is_bounded():
  assert 'jax>=0.10.2,<0.13' in listed('options', 'install_requires')
  assert SETUP['options']['python_requires'] == '>=3.11'


def test_inference_imports_only_what_the_light_install_declares():
  house = read_house()
  files = {module for root in INFERENCE for module in reached(house, root, lazy=LAZY)} - {*LAZY}
  imported = third_parties({module: house[module] for module in files})
  missing = imported - names(listed('options', 'install_requires'))
  assert not missing


def test_every_import_is_declared_somewhere():
  declared = names(listed('options', 'install_requires')).union(*map(names, extras().values()))
  # The original is under a non-commercial licence: who wants to compare with it installs it.
  assert not third_parties(read_house()) - declared - {'codicodec'}


def test_every_package_is_listed():
  """setuptools installs what setup.cfg lists; a package not listed works only in a checkout."""
  packages = {'.'.join(path.parent.relative_to(ROOT).parts)
              for path in (ROOT / 'm2l2').rglob('__init__.py')}
  assert set(listed('options', 'packages')) == packages | {'m2l2.configs'}


def test_assets_are_package_data():
  assert listed('options.package_data', 'm2l2') == ['assets/**/*', 'py.typed']
  assert (ROOT / 'm2l2' / 'assets').is_dir() and (ROOT / 'm2l2' / 'py.typed').is_file()


def test_pyproject_only_points_at_setuptools():
  assert set(tomllib.loads((ROOT / 'pyproject.toml').read_text())) == {'build-system'}
  assert len((ROOT / 'pyproject.toml').read_text().splitlines()) == 3


@pytest.mark.parametrize('stand_in', [True, False])
def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(stand_in, tmp_path):
  """Not without the stand-in, with the finder alone that setuptools makes of it; PYTHONPATH goes before, as ever."""
  for place, text in (('holds/m2l2', 'load = "clone"'), ('other', 'load = "other"')):
    (tmp_path / place / 'm2l2').mkdir(parents=True)
    (tmp_path / place / 'm2l2' / '__init__.py').write_text(text)
    (tmp_path / place / 'm2l2' / 'part.py').write_text('')
  finder = """import importlib.util, sys
class Finder:
  @staticmethod
  def find_spec(name, path=None, target=None):
    if name == 'm2l2':
      return importlib.util.spec_from_file_location(name, '{place}/m2l2/m2l2/__init__.py')
sys.meta_path.append(Finder)
""".format(place=tmp_path / 'holds')
  wheel = tmp_path / 'm2l2-0-0.editable-py3-none-any.whl'
  with zipfile.ZipFile(wheel, 'w') as archive:
    archive.writestr('finder.py', finder)
    archive.writestr('m2l2.pth', 'import finder')
    archive.writestr('m2l2-0.dist-info/RECORD', 'm2l2.pth,,\n')
  if stand_in:
    runpy.run_path(str(ROOT / 'setup.py'))['add_stand_in'](wheel, tmp_path / 'holds' / 'm2l2')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'site')
  listed = (tmp_path / 'site' / 'm2l2-0.dist-info' / 'RECORD').read_text().split()
  assert listed[-1] == 'm2l2.pth,,' and len(listed) == 1 + stand_in

  def imported(folder, first='""'):
    program = (f'import site, sys; sys.path.insert(0, {first}); site.addsitedir("{tmp_path}/site"); import m2l2; '
               'print(getattr(m2l2, "load", None)); import m2l2.part')
    done = subprocess.run([sys.executable, '-S', '-E', '-c', program], cwd=folder, capture_output=True, text=True,
                          check=False)
    return done.stdout.strip()

  for folder in (tmp_path / 'holds' / 'm2l2', tmp_path):
    assert imported(folder) == 'clone'
  assert imported(tmp_path / 'holds') == ('clone' if stand_in else 'None')
  assert imported(tmp_path / 'holds', first=repr(str(tmp_path / 'other'))) == 'other'


def test_nothing_stray_at_the_root():
  names = {path.name for path in ROOT.iterdir() if not path.name.startswith('.')}
  assert names - AT_ROOT - MADE == set()


def test_git_ignores_data_at_the_root_only():
  lines = (ROOT / '.gitignore').read_text().splitlines()
  assert '/data/' in lines and 'data/' not in lines and 'data' not in lines


def test_license_is_apache():
  text = (ROOT / 'LICENSE').read_text()
  assert 'Apache License' in text and 'END OF TERMS AND CONDITIONS' in text
  assert SETUP['metadata']['license'] == 'Apache-2.0'


def test_scripts_are_executable():
  scripts = [ROOT / '.ci' / 'run', *(path for path in (ROOT / 'launch').rglob('*.sh')
                                     if path.read_text().startswith('#!'))]
  assert len(scripts) >= 2
  for path in scripts:
    assert path.stat().st_mode & stat.S_IXUSR, path


def test_version_has_one_source():
  assert SETUP['metadata']['version'] == 'attr: m2l2.__version__'
  assert re.fullmatch(r'\d+\.\d+\.\d+', m2l2.__version__)


def test_the_citation_is_of_this_version_and_names_the_paper():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
  assert citation['version'] == m2l2.__version__ and citation['license'] == SETUP['metadata']['license']
  assert citation['url'] == citation['repository-code'] == SETUP['metadata']['url']
  paper = citation['preferred-citation']
  assert [author['family-names'] for author in paper['authors']] == ['Pasini', 'Lattner', 'Fazekas']
  assert paper['url'].endswith('/2501.17578') and 'doi' not in paper


def test_the_public_names():
  assert dir(m2l2) == sorted(m2l2.__all__) == ['Codec', 'Latents', '__version__', 'load', 'train']
  for name in m2l2.__all__:
    assert getattr(m2l2, name) is not None
  with pytest.raises(AttributeError, match="'m2l2' has no attribute 'lode'"):
    _ = m2l2.lode


@pytest.mark.parametrize('line, instead', [
    ('from m2l2 import train_step', 'm2l2.training.train_step'), ('import m2l2.snapshot', 'm2l2.codec.snapshot'),
    ('from m2l2.latents import Latents', 'm2l2.codec.latents'), ('from m2l2.train import train', 'm2l2.training.loop'),
    ('from m2l2.evaluation import pairs', 'm2l2.evaluation.metrics.pairs'), ('from m2l2 import clips', 'm2l2.assets'),
    ('from m2l2.data import decoder', 'm2l2.data.prepare.child'),
    ('from m2l2.evaluation.clips import take_excerpts', 'm2l2.evaluation.excerpts'),
    ('from m2l2.evaluation.sweep import sweep', 'm2l2.evaluation.studies.sweep')])
def test_an_import_from_before_the_rooms_says_what_to_write(line, instead):
  with pytest.raises(ModuleNotFoundError, match=f'is now {instead}: write that instead'):
    exec(line)
  importlib.import_module(instead)


@pytest.mark.parametrize('line', ['from m2l2 import Codec, Latents, load, train', 'from m2l2.codec import Codec, load',
                                  'from m2l2.data.latents import latent_source'])
def test_public_imports_stay(line):
  exec(line)


def test_every_signpost_points_at_a_module():
  for place in m2l2._NOW.values():
    assert importlib.util.find_spec(place), place


def test_the_presets_are_installed():
  import m2l2.configs
  assert Path(m2l2.configs.__file__).parent == ROOT / 'configs'
  (script,) = importlib.metadata.entry_points(group='console_scripts', name='m2l2')
  assert script.value == 'm2l2.cli:main'
