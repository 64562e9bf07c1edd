"""Processors for the tiny models: the families' own classes with PIL image processors, no torchvision."""

import pathlib
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from sinkscope.testing.tokenizers import QWEN_CHAT_TEMPLATE, llava_tokenizer, qwen_tokenizer

QWEN_PATCH, QWEN_MERGE, QWEN_TEMPORAL = 14, 2, 2


class ImageQwen2_5_VLProcessor(Qwen2_5_VLProcessor):  # noqa: N801
    """``Qwen2_5_VLProcessor`` without its video slot, for machines without torchvision.

    transformers' video processors need torchvision, and without it the parent class cannot be built
    at all. Text and images take the parent's own path. What is saved names the parent class and the
    real video processor, so the folder loads with ``AutoProcessor`` where torchvision is installed;
    elsewhere use `load_processor`.
    """

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ) -> None:
        self.image_token = tokenizer.image_token
        self.video_token = tokenizer.video_token
        self.image_token_id = tokenizer.image_token_id
        self.video_token_id = tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def validate_inputs(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raise ``ValueError`` for videos, then check as the parent does."""
        if videos is not None:
            raise ValueError(
                "this processor takes images and text, but videos came; pass images=..., or install "
                "torchvision and build transformers' Qwen2_5_VLProcessor"
            )
        super().validate_inputs(images=images, text=text, videos=None, audio=audio, **kwargs)

    def to_dict(self) -> dict[str, object]:
        """Settings as the parent class would save them, its default video settings included."""
        settings = super().to_dict()
        settings["processor_class"] = Qwen2_5_VLProcessor.__name__
        settings["video_processor"] = {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "patch_size": QWEN_PATCH,
            "merge_size": QWEN_MERGE,
            "temporal_patch_size": QWEN_TEMPORAL,
        }
        return settings


def llava_processor(tower: str, image_size: int, patch_size: int) -> LlavaProcessor:
    """``LlavaProcessor`` for a CLIP tower (centre crop, CLS dropped) or a SigLIP tower (all kept).

    One image becomes ``(image_size // patch_size) ** 2`` image tokens in either case.
    """
    tokenizer = llava_tokenizer()
    if tower == "clip":
        images = CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
        )
    else:
        images = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        num_additional_image_tokens=1 if tower == "clip" else 0,
        chat_template=tokenizer.chat_template,
    )


def qwen2_5_vl_processor(min_pixels: int, max_pixels: int) -> ImageQwen2_5_VLProcessor:
    """Qwen2.5-VL processor for images: sides rounded to 28 pixels, area kept in the given range."""
    tokenizer = qwen_tokenizer()
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        patch_size=QWEN_PATCH,
        merge_size=QWEN_MERGE,
        temporal_patch_size=QWEN_TEMPORAL,
    )
    return ImageQwen2_5_VLProcessor(images, tokenizer, chat_template=QWEN_CHAT_TEMPLATE)


def load_processor(folder: str | pathlib.Path) -> ProcessorMixin:
    """Load what `write_checkpoint` saved, also where ``AutoProcessor`` would need torchvision.

    LLaVA folders go through ``AutoProcessor``; Qwen2.5-VL folders give an
    `ImageQwen2_5_VLProcessor` with the saved image processor, tokenizer and chat template.
    """
    where = str(folder)
    settings: dict[str, Any] = ProcessorMixin.get_processor_dict(where)[0]
    if settings.get("processor_class") != Qwen2_5_VLProcessor.__name__:
        return AutoProcessor.from_pretrained(where)
    return ImageQwen2_5_VLProcessor(
        AutoImageProcessor.from_pretrained(where),
        AutoTokenizer.from_pretrained(where),
        chat_template=str(settings["chat_template"]),
    )
