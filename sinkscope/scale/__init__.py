"""Run an experiment's parts here or on many workers: ``engine="local"``, ``"ray"`` or `Ray`."""

from sinkscope.scale.engine import Ray

__all__ = ["Ray"]
