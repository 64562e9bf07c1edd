"""Processors for the tiny models: the families' own classes with PIL image processors, no torchvision."""

from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from sinkscope.models.processors import ImageQwen2_5_VLProcessor
from sinkscope.testing.tokenizers import (
    QWEN_CHAT_TEMPLATE,
    gemma_tokenizer,
    llava_tokenizer,
    qwen_tokenizer,
)

QWEN_PATCH, QWEN_MERGE, QWEN_TEMPORAL = 14, 2, 2
WITH_CLS = ("clip", "dinov2")


def llava_processor(
    tower: str, image_size: int, patch_size: int, strategy: str | None = None
) -> LlavaProcessor:
    """``LlavaProcessor`` for a tower with CLS (centre crop), or for SigLIP (images are squeezed).

    Args:
        tower: The tower's name.
        image_size: Side in pixels of what the tower reads.
        patch_size: Side of a patch in pixels.
        strategy: ``"default"`` drops the first ViT token, ``"full"`` keeps all; None drops CLS only.

    Returns:
        The processor; one image becomes ``(image_size // patch_size) ** 2`` tokens, and CLS if kept.
    """
    tokenizer, has_cls = llava_tokenizer(), tower in WITH_CLS
    if has_cls:
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
        vision_feature_select_strategy=strategy or ("default" if has_cls else "full"),
        num_additional_image_tokens=int(has_cls),
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


def gemma3_processor(image_size: int, tokens: int) -> Gemma3Processor:
    """``Gemma3Processor``: images squeezed to a square, ``tokens`` soft tokens each, no pan and scan."""
    tokenizer = gemma_tokenizer()
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=tokens,
    )
