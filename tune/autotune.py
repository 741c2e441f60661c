"""`mla-cute tune` without the command line's dependencies: python tune/autotune.py --help."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from mla_cute.tuning.command import main

if __name__ == "__main__":
    sys.exit(main())
