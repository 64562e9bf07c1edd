"""sinkscope: attention sinks in vision-language models, seen, traced and explained.

The usual way in::

    import sinkscope as ss

    lvlm = ss.load_bundled()                                  # or ss.LVLM.from_pretrained(name)
    sample = lvlm.prepare(images=image, text="How many shapes are there?")
    trace = ss.trace_sinks(lvlm, sample)
    print(trace.summary())

The stub beside this file lists the public names. Each is imported when it is asked for, so that the command
line starts at once.
"""

import lazy_loader

__version__ = "0.1.0"
_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name):
    """Import a public name; of one that lives in a room say which."""
    try:
        return _find(name)
    except AttributeError as error:
        rooms = (
            "probes",
            "interventions",
            "detectors",
            "experiments",
            "lsg",
            "models",
            "published",
            "viz",
            "testing",
        )
        known = () if name.startswith("_") else rooms
        where = [f"sinkscope.{room}.{name}" for room in known if name in _find(room).__all__]
        hint = f"; write {where[0]}" if where else ""
        raise AttributeError(f"module 'sinkscope' has no attribute {name!r}{hint}") from error
