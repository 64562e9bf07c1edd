"""How the parts are joined: image size, prompt, and the files that ship with the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SIZE = 224
"""Pixels per side of an image."""
PATCH = 14
"""Pixels per side of a patch."""
IMAGE_TOKENS = (SIZE // PATCH) ** 2 + 1
"""Tokens of an image in the prompt: its patches and CLS."""
VISION_LAYER = -2
"""Which hidden state of the tower the projector reads: what the second-last block writes."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template: SmolLM2's turns, without its system prompt, the image first."""

ADAPTERS = Path(__file__).parent / "adapters"
PROJECTOR = ADAPTERS / "projector.safetensors"
LORA = ADAPTERS / "adapter_model.safetensors"
LORA_CONFIG = ADAPTERS / "adapter_config.json"
VERSION = 1
"""Raised when the assembly makes other files of the same parts."""


def digest(sources: list[str]) -> str:
    """What an assembled model is made of, in twelve hexadecimal digits.

    Args:
        sources: What stands for the published weights: checksums, or repositories.
    """
    shipped = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (PROJECTOR, LORA)]
    parts = [VERSION, SIZE, PATCH, VISION_LAYER, TEMPLATE, LORA_CONFIG.read_text("utf-8")]
    text = json.dumps([parts, shipped, sources])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
