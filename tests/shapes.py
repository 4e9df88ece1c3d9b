"""What checks the signatures of m2l2 while its tests run (conftest.py)."""

import beartype

_checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # int passes for float


def checked(function):
  """The function with its arguments and results checked; the fields of dataclasses are checked by the classes."""
  return function if function.__name__ == '__init__' else _checked(function)
