"""Models to test against: tiny random ones per family, and ones with sinks planted in them.

Depends on torch, transformers, tokenizers and PIL only, never on the rest of the package.
"""

from sinkscope.testing.planted import plant, random_plant, sink_free
from sinkscope.testing.processors import ImageQwen2_5_VLProcessor, load_processor
from sinkscope.testing.tiny import (
    TINY,
    random_image,
    tiny_llava,
    tiny_qwen2_5_vl,
    write_checkpoint,
)
from sinkscope.testing.truth import Planted, Truth

__all__ = [
    "TINY",
    "ImageQwen2_5_VLProcessor",
    "Planted",
    "Truth",
    "load_processor",
    "plant",
    "random_image",
    "random_plant",
    "sink_free",
    "tiny_llava",
    "tiny_qwen2_5_vl",
    "write_checkpoint",
]
