"""What a model's modules and config do not tell, given by hand: hints by ``model_type``."""

from dataclasses import dataclass

from sinkscope.checks import is_whole, typed
from sinkscope.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Hints for models of one ``model_type``; what is "" or None is looked for. See `register_family`."""

    vision_tower: str = ""
    projector: str = ""
    decoder: str = ""
    image_token_id: int | None = None


HINTS: dict[str, Family] = {}


@typed
def register_family(
    model_type: str,
    *,
    vision_tower: str = "",
    projector: str = "",
    decoder: str = "",
    image_token_id: int | None = None,
) -> None:
    """Tell where the parts of a family are, for models in which sinkscope does not find them itself.

    Everything else is measured when a model is loaded, and so is whether the hint is right. A second call
    for the same type replaces the first.

    Args:
        model_type: ``config.model_type`` of the models.
        vision_tower: Dotted path of the module that holds the vision blocks.
        projector: Dotted path of the module between the vision tower and the decoder.
        decoder: Dotted path of the language model, where ``get_decoder()`` gives another part.
        image_token_id: The token id that the tower's output replaces.

    Raises:
        ModelError: If no name was given, or the id is no whole number from 0. A path that a model does not
            have is refused when the model is loaded.
    """
    if not model_type:
        raise ModelError(
            f"Got model_type={model_type!r}; expected that of the config. Write 'llava'."
        )
    if image_token_id is not None and not is_whole(image_token_id, 0):
        got = f"Got image_token_id={image_token_id!r}; expected a whole number from 0"
        raise ModelError(f"{got}. Write tokenizer.convert_tokens_to_ids('<image>').")
    HINTS[model_type] = Family(vision_tower, projector, decoder, image_token_id)
