"""``python -m sinkscope`` is the command line."""

import sys

from sinkscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
