""".github/API.md says what the docstrings say."""

import ast
import inspect

import m2l2
from launch import api


def test_the_page_is_fresh():
  assert api.PAGE.read_text(encoding='utf-8') == api.page(), 'stale: python launch/api.py rewrites it'


def test_check_tells_a_stale_page(tmp_path, monkeypatch, capsys):
  stale = tmp_path / 'API.md'
  monkeypatch.setattr(api, 'PAGE', stale)
  assert api.main(['--check']) == 1 and 'launch/api.py' in capsys.readouterr().err
  assert api.main([]) == 0 and api.main(['--check']) == 0
  stale.write_text(stale.read_text() + 'x')
  assert api.main(['--check']) == 1


def test_every_public_method_is_there():
  text = api.page()
  for owner in (m2l2.Codec, m2l2.Latents):
    for name, _ in inspect.getmembers(owner, callable):
      if not name.startswith('_'):
        assert f'#### `{owner.__name__}.{name}`' in text


def test_every_field_of_the_config_is_there():
  from m2l2.configs import base
  text = api.page()
  config = base.get_config().to_dict()
  wanted = {path for group, values in config.items()
            for path in ([f'{group}.{name}' for name in values] if isinstance(values, dict) else [group])}
  assert {line.split('`')[1] for line in text.partition('## Config fields')[2].splitlines()
          if line.startswith('| `')} == wanted


def test_signatures_are_as_written():
  node = ast.parse('def f(self, a: int, *, b=1) -> str:\n  "Does.\\n\\n  More."').body[0]
  assert api.described('####', 'A.f', node) == (
      '#### `A.f`\n\n```python\nA.f(a: int, *, b=1) -> str\n```\n\nDoes.\n\n```text\nMore.\n```\n')
