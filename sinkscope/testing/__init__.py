"""Models to test against: tiny random ones per family, and ones with sinks planted in them; and checks.

Of the package it knows value checks and how processors are loaded (`sinkscope.models.loading`); `check_model`
alone uses the rest, and compares it with plain passes.
"""

from sinkscope.models.loading import ImageQwen2_5_VLProcessor, load_processor
from sinkscope.testing.checking import Check, ModelCheck, check_model
from sinkscope.testing.circuits import Planted, Truth
from sinkscope.testing.contracts import ContractError, check_intervention, check_probe
from sinkscope.testing.planted import plant, random_plant, sink_free
from sinkscope.testing.tiny import (
    TINY,
    random_image,
    tiny_gemma3,
    tiny_llava,
    tiny_qwen2_5_vl,
    write_checkpoint,
)

__all__ = ["TINY", "Check", "ContractError", "ImageQwen2_5_VLProcessor", "ModelCheck", "Planted"]
__all__ += ["Truth", "check_intervention", "check_model", "check_probe", "load_processor", "plant"]
__all__ += ["random_image"]
__all__ += ["random_plant", "sink_free", "tiny_gemma3", "tiny_llava", "tiny_qwen2_5_vl"]
__all__ += ["write_checkpoint"]
