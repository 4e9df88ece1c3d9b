"""Writes .github/API.md, all public names, from the docstrings.

    python launch/api.py             # rewrites it
    python launch/api.py --check     # exit status 1 where it is stale

Signatures are read from the source, as written there, so nothing heavy is imported.
"""

import ast
from pathlib import Path
import re
import sys
import textwrap

import m2l2
from m2l2 import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / '.github' / 'API.md'
HEAD = '''# All public names of m2l2

Made from the docstrings by `python launch/api.py`; a test fails when it is stale. What is not here, or begins with an
underscore, may change without notice.
'''
# (heading, module, names; None: all public functions and classes in it), then whole packages, module by module.
SECTIONS = (('Errors', 'm2l2.errors', None), ('Training', 'm2l2.training.loop', ('train',)))
PACKAGES = (('Evaluation', 'm2l2.evaluation'), ('Interop', 'm2l2.interop'))


def page() -> str:
  """The whole page, Markdown."""
  parts = [HEAD, '## m2l2\n', *(entry(module, name, prefix='m2l2') for name, module in sorted(public_names().items()))]
  for heading, module, names in SECTIONS:
    parts += [f'## {heading}: `{module}`\n', prose(ast.get_docstring(parsed(module))), *entries(module, names)]
  for heading, package in PACKAGES:
    for path in sorted(source(package).parent.glob('[!_]*.py')):
      module = f'{package}.{path.stem}'
      parts += [f'## {heading}: `{module}`\n', prose(ast.get_docstring(parsed(module))), *entries(module)]
  return '\n'.join([*parts, '## Commands\n', commands(), '## Config fields\n', fields()])


def public_names() -> dict[str, str]:
  """What `import m2l2` offers: name -> the module that it comes from."""
  return {name: home for name, home in m2l2._HOME.items() if name in m2l2.__all__}


# ---- modules -------------------------------------------------------------------------------------


def source(module) -> Path:
  path = ROOT.joinpath(*module.split('.'))
  return path / '__init__.py' if path.is_dir() else path.with_suffix('.py')


def parsed(module) -> ast.Module:
  return ast.parse(source(module).read_text(encoding='utf-8'))


def entries(module, names=None) -> list[str]:
  """An entry for each public function and class of a module, in the order of the file."""
  found = [node.name for node in parsed(module).body if is_public(node)]
  return [entry(module, name, prefix=module) for name in found if names is None or name in names]


def is_public(node) -> bool:
  return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')


def entry(module, name, *, prefix) -> str:
  """A function, or a class with its public methods and properties."""
  node = next(node for node in parsed(module).body if is_public(node) and node.name == name)
  if isinstance(node, ast.FunctionDef):
    return described('###', f'{prefix}.{name}', node)
  methods = [inner for inner in node.body if is_public(inner) and ast.get_docstring(inner)]
  return '\n'.join([f'### class `{prefix}.{name}`\n', prose(ast.get_docstring(node)),
                    *(described('####', f'{name}.{method.name}', method) for method in methods)])


def described(heading, name, function) -> str:
  """Heading, signature and docstring of a function or method."""
  marks = {ast.unparse(mark) for mark in function.decorator_list}
  if 'property' in marks:
    signature = name
  else:
    arguments = function.args
    if heading == '####':  # self or cls: not what the caller gives
      first = arguments.posonlyargs or arguments.args
      del first[:1]
    result = f' -> {ast.unparse(function.returns)}' if function.returns else ''
    signature = f'{name}({ast.unparse(arguments)}){result}'
  lines = textwrap.wrap(signature, 110, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)
  code = '\n'.join(['```python', *lines, '```'])
  return f'{heading} `{name}`\n\n{code}\n\n{prose(ast.get_docstring(function))}'


def prose(docstring) -> str:
  """A docstring as Markdown: its first paragraph as text, the rest as it is laid out."""
  first, _, rest = (docstring or '').partition('\n\n')
  rest = f'\n\n```text\n{rest.rstrip()}\n```' if rest.strip() else ''
  return f'{first}{rest}\n'


# ---- commands and config -------------------------------------------------------------------------


def commands() -> str:
  """The command line's commands, each with its summary and an example."""
  (group,) = (action for action in cli._parser()._actions if hasattr(action, 'choices') and action.choices)
  lines = []
  for name, parser in group.choices.items():
    summary, _, example = parser.description.partition('\n\n')
    lines += [f'**`m2l2 {name}`**: {summary}', '', '```bash', textwrap.dedent(example).rstrip(), '```', '']
  return '\n'.join(lines)


def fields() -> str:
  """The fields of configs/base.py with their defaults and comments, as tables."""
  lines, part = ['`configs/base.py`, whose fields the other configs change.'], None
  listing, _, _ = (ROOT / 'configs' / 'base.py').read_text(encoding='utf-8').partition('\n\n\ndef any_type')
  for line in listing.splitlines():
    found = re.fullmatch(r'  (\w+)\.(\w+) = (.*?)(?: +# (.*))?', line)
    if not found or 'ConfigDict()' in line:
      continue
    group, name, value, comment = found.groups()
    if group != part:
      lines += ['', '| field | default | |', '|---|---|---|']
      part = group
    path = name if group == 'config' else f'{group}.{name}'
    value = value.removeprefix('any_type(').removesuffix(')') if value.startswith('any_type(') else value
    lines.append(f'| `{path}` | `{value}` | {(comment or "").replace("|", chr(92) + "|")} |')
  return '\n'.join(lines) + '\n'


def main(argv) -> int:
  text = page()
  if '--check' in argv:
    stale = not PAGE.is_file() or PAGE.read_text(encoding='utf-8') != text
    if stale:
      print(f'{PAGE.name} is stale: python launch/api.py rewrites it', file=sys.stderr)
    return int(stale)
  temporary = PAGE.with_suffix('.part')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(PAGE)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
