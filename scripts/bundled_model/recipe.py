"""The bundled model before training: its configuration, its tokenizer and its processor.

Only classes of transformers are used, in the LLaVA-1.5 layout: a CLIP tower read at its second-last
block without CLS, a two-layer projector, and a Llama decoder. Its prompts read

    <s> USER: <image> x 64  what shape is at the top left ? ASSISTANT: circle </s>
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope.bundled.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    ROWS,
    SHAPES,
)

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

PATCH_SIZE = 8  # pixels
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")  # a token's id is its place here
QUESTION_WORDS = (
    *("how", "many", "shapes", "are", "there", "?"),
    *("what", "colour", "is", "the", "background", "shape", "at"),
)
ROLES = ("USER:", "ASSISTANT:")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every token with its id: the special tokens first, then the words of scenes and questions."""
    digits = [str(number) for number in range(MAX_OBJECTS + 1)]
    words = [*SPECIAL_TOKENS, *ROLES, *QUESTION_WORDS, *digits, *SHAPES]
    words += [*COLOURS, *BACKGROUNDS, *ROWS, *COLUMNS]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; lower and upper case are the same, and a BOS is put in front."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,!]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>", *ROLES],
        model_max_length=1024,
        padding_side="left",
    )


def build_processor() -> LlavaProcessor:
    """The processor; its image side is the PIL one, so torchvision is not needed."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config() -> LlavaConfig:
    """Two million parameters: six blocks of width 128 in the tower, five in the decoder.

    Head dimension is 64 on both sides. The tower's last block is trained but, as in LLaVA-1.5, not
    read by the language model.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.06,  # 0.02 suits widths of thousands; here it only prolongs the start
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
