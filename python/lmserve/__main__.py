"""`python -m lmserve` is `lmserve`."""

from __future__ import annotations

import sys

from lmserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
