"""What checks the signatures of m2l2 while its tests run (conftest.py)."""

import beartype

# int passes for float, as in Python's type system.
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
