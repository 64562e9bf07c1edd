"""Models: anatomy, inputs, and the runner. The only room that knows nnsight and transformers."""

from sinkscope.models.anatomy import Anatomy, TowerAnatomy
from sinkscope.models.context import Context
from sinkscope.models.judging import Verdict
from sinkscope.models.lvlm import LVLM, Generation, Run
from sinkscope.models.prepare import Sample
from sinkscope.models.report import Report

__all__ = [
    "LVLM",
    "Anatomy",
    "Context",
    "Generation",
    "Report",
    "Run",
    "Sample",
    "TowerAnatomy",
    "Verdict",
]
