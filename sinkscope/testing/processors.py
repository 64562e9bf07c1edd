"""Processors with small real tokenizers: byte-level BPE trained on a few sentences, and special tokens."""

from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# What the merges are trained on. Other text falls back to bytes, so no text is unknown.
SENTENCES = (
    "USER: How many red shapes are in the image? ASSISTANT: There are 3 red shapes.",
    "What color is the large circle to the left of the small blue square?",
    "Is there a green triangle above the yellow star? Answer yes or no.",
    "Describe the scene in one sentence. Which object is the biggest?",
    "system user assistant You are a helpful assistant.",
    "The image shows two squares, a circle and nothing else: 0 1 2 3 4 5 6 7 8 9.",
)
LLAVA_CHAT, QWEN_CHAT, GEMMA_CHAT = (
    Path(__file__).with_name("templates").joinpath(f"{name}.jinja").read_text("utf-8")
    for name in ("llava", "qwen", "gemma")
)
WITH_CLS = ("clip", "dinov2")


def llava_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Tokenizer that begins each text with ``<s>`` and pads on the left, as LLaVA-1.5's does."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _tokenizer(special, ends, {"image_token": "<image>"}, LLAVA_CHAT)


def qwen_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Tokenizer with Qwen's markers and no beginning-of-sequence token; pads on the left."""
    words = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad"
    more = {"vision_bos": "vision_start", "vision_eos": "vision_end", "image": "image_pad"}
    more |= {"video": "video_pad", "im_start": "im_start"}
    more = {f"{name}_token": f"<|{word}|>" for name, word in more.items()}
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _tokenizer([f"<|{word}|>" for word in words.split()], ends, more, QWEN_CHAT)


def gemma_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Tokenizer that begins each text with ``<bos>``, with Gemma 3's image markers; pads on the left."""
    words = "pad eos bos unk start_of_turn end_of_turn start_of_image end_of_image image_soft_token"
    images = {"boi": "start_of_image", "eoi": "end_of_image", "image": "image_soft_token"}
    more = {f"{name}_token": f"<{word}>" for name, word in images.items()}
    ends = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    return _tokenizer([f"<{word}>" for word in words.split()], ends, more, GEMMA_CHAT)


def _tokenizer(
    special: list[str], ends: dict[str, str], more: dict[str, str], template: str
) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE trained on `SENTENCES`; ``special`` get the ids 0, 1, ...; BOS comes first, if any."""
    core, bos = Tokenizer(models.BPE()), ends.get("bos_token")
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = [AddedToken(token, special=True, normalized=False) for token in special]
    how: dict[str, Any] = {"vocab_size": 448, "min_frequency": 1, "show_progress": False}
    how |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": tokens}
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(**how))
    if bos is not None:
        single, known = f"{bos} $A", [(bos, core.token_to_id(bos))]
        core.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} {bos} $B", special_tokens=known
        )
    settings: dict[str, Any] = {**ends, "padding_side": "left", "chat_template": template}
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=more, **settings)


def llava_processor(
    tower: str, image_size: int, patch_size: int, strategy: str | None = None
) -> hf.LlavaProcessor:
    """``LlavaProcessor`` for a tower with CLS (centre crop), or for SigLIP (images are squeezed).

    One image becomes ``(image_size // patch_size) ** 2`` tokens, and CLS if kept: strategy ``"default"``
    drops the first ViT token, ``"full"`` keeps all, None drops CLS only.
    """
    has_cls, square = tower in WITH_CLS, {"height": image_size, "width": image_size}
    images: Any = hf.SiglipImageProcessorPil(size=square)
    if has_cls:
        images = hf.CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)
    how: Any = {"patch_size": patch_size, "num_additional_image_tokens": int(has_cls)}
    how["vision_feature_select_strategy"] = strategy or ("default" if has_cls else "full")
    return hf.LlavaProcessor(images, llava_tokenizer(), chat_template=LLAVA_CHAT, **how)
