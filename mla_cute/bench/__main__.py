"""`python -m mla_cute.bench`: the bench without the CLI's dependencies."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
