"""Load a processor, also where transformers' own class would need torchvision for its video part."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin, Qwen2_5_VLProcessor


class ImageQwen2_5_VLProcessor(Qwen2_5_VLProcessor):  # noqa: N801  as transformers writes it
    """``Qwen2_5_VLProcessor`` without its video slot, for machines without torchvision.

    The tokenizer has an ``image_token`` and a ``video_token``. What is saved loads with
    ``AutoProcessor`` where torchvision is installed, and elsewhere with `load_processor`.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, chat_template: str | None = None
    ) -> None:
        for name in ("image_token", "video_token", "image_token_id", "video_token_id"):
            setattr(self, name, getattr(tokenizer, name))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def validate_inputs(  # type: ignore[override]
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> None:
        """Raise ``ValueError`` for videos, then check as the parent does."""
        if videos is not None:
            raise ValueError(
                "this processor takes images and text, but videos came; pass images=..., or install "
                "torchvision and build transformers' Qwen2_5_VLProcessor"
            )
        super().validate_inputs(images=images, text=text, videos=None, **kwargs)

    def to_dict(self) -> dict[str, object]:
        """Settings as the parent class would save them, its default video settings included."""
        images: Any = self.image_processor
        names = ("patch_size", "merge_size", "temporal_patch_size")
        video = {name: getattr(images, name) for name in names}
        return super().to_dict() | {
            "processor_class": Qwen2_5_VLProcessor.__name__,
            "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", **video},
        }


def load_processor(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> ProcessorMixin:
    """What ``AutoProcessor`` gives, or without torchvision the family's processor without videos.

    ImportError if a package is missing and the family has no processor without it.
    """
    where, trust = str(name), trust_remote_code is True
    try:
        return AutoProcessor.from_pretrained(where, revision=revision, trust_remote_code=trust)
    except ImportError:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
        if config.model_type != "qwen2_5_vl":
            raise
    return ImageQwen2_5_VLProcessor.from_pretrained(where, revision=revision or "main")
