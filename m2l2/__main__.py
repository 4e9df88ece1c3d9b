"""`python -m m2l2` is the `m2l2` command."""

import sys

from m2l2.cli import main

if __name__ == '__main__':
  sys.exit(main())
