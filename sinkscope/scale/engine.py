"""Do the same work on every part of a data set: here, one after the other, or on workers that hold a model each."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sinkscope.checks import check_choice
from sinkscope.models.lvlm import LVLM

Work = Callable[[LVLM, Any], Any]
"""What is done with a part; it can be pickled, so that it travels to workers: a function of a module, or a
`functools.partial` of one."""


def each_part(
    lvlm: LVLM, work: Work, parts: Iterable[tuple[str, Any]], engine: Any = "local"
) -> Iterator[tuple[str, Any]]:
    """Give the key of every part with what ``work`` makes of it, as soon as it is done.

    Keys are those of the parts, each once, in any order. ``parts`` is read as it is needed.
    """
    check_choice(("local",), engine=engine)
    for key, part in parts:
        yield key, work(lvlm, part)
