"""sinkscope: attention sinks in vision-language models, seen, traced and explained.

The usual way in::

    import sinkscope as ss

    lvlm = ss.load_bundled()                                  # or ss.LVLM.from_pretrained(name)
    sample = lvlm.prepare(images=image, text="How many shapes are there?")
    trace = ss.trace_sinks(lvlm, sample)
    print(trace.summary())
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sinkscope._public import *  # noqa: F403
    from sinkscope._public import __all__ as __all__
else:

    def __getattr__(name):
        """Import all public names when the first is asked for: the command line needs none to start."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'sinkscope' has no attribute {name!r}")
        public = import_module("sinkscope._public")
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
        if name in globals():  # a submodule that came with them
            return globals()[name]
        rooms = [room for room in public.ROOMS if name in getattr(public, room).__all__]
        where = f"; write sinkscope.{rooms[0]}.{name}" if rooms else ""
        raise AttributeError(f"module 'sinkscope' has no attribute {name!r}{where}")

    def __dir__():
        return sorted({*globals(), *import_module("sinkscope._public").__all__})
