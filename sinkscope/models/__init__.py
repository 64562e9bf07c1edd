"""Models: anatomy, samples and runs. Only this part uses nnsight."""

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM, Generation, Run
from sinkscope.models.report import Report, Verdict
from sinkscope.models.wire import Traffic, Wire
from sinkscope.tokens import TokenMap, VisionMap

__all__ = ["LVLM", "Anatomy", "Context", "Generation", "Report", "Run", "Sample", "TokenMap"]
__all__ += ["TowerAnatomy", "Traffic", "Verdict", "VisionMap", "Wire"]
