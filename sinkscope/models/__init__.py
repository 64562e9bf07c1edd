"""Models: anatomy, inputs, and the runner. The only room that knows nnsight and transformers."""

from sinkscope.models.lvlm import LVLM, Generation, Run
from sinkscope.models.prepare import Sample

__all__ = ["LVLM", "Generation", "Run", "Sample"]
