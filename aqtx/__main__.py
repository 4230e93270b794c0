"""`python -m aqtx` is `aqtx`."""

import sys

from aqtx.cli import main

if __name__ == "__main__":
    sys.exit(main())
