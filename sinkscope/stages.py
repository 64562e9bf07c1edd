"""Say what a command is doing: a bar in a terminal, lines on standard error elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stages(total: int, first: str) -> Iterator[Callable[[str], None]]:
    """Say what is done, stage by stage.

    Args:
        total: How many stages there are.
        first: The first one, such as ``"loading the model"``.

    Yields:
        A function that ends a stage and names the next.
    """
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=first, disable=None, leave=False) as bar:

        def say(text: str) -> None:
            if bar.disable:
                sys.stderr.write(f"sinkscope: {text} ...\n")
                sys.stderr.flush()

        def step(text: str) -> None:
            say(text)
            bar.update()
            bar.set_description(text)

        say(first)
        yield step
