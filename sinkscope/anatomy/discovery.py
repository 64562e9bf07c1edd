"""Read a model's anatomy from its module tree.

The decoder is what ``get_decoder()`` returns, the vision tower is the other list of blocks with
attention, the projector is named by the family's row.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sinkscope.anatomy.attention_call import calls_attention, kernel_of, look_for_attention_call
from sinkscope.anatomy.block_sum import read_branches
from sinkscope.anatomy.families import Family, family_of
from sinkscope.anatomy.holding import check_unwrapped
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.errors import ModelError

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "proj", "dense", "wo")


def read_anatomy(model: Any) -> Anatomy:
    """Find the anatomy of a Hugging Face LVLM.

    Args:
        model: A ``transformers`` image-text-to-text model; meta tensors suffice.

    Returns:
        The anatomy.

    Raises:
        ModelError: If there is no vision tower, no decoder or no known projector, or the kernel
            cannot be asked again.
    """
    config = check_model(model)
    check_kernels(config)
    family = family_of(config.model_type)
    paths = {id(module): path for path, module in model.named_modules()}
    decoder: nn.Module = model.get_decoder()
    language_blocks = find_blocks(decoder)
    vision_blocks = find_blocks(model, skip={id(m) for m in decoder.modules()})
    if not language_blocks or not vision_blocks:
        missing = "decoder blocks" if not language_blocks else "vision blocks"
        raise ModelError(
            f"Found no {missing} in {type(model).__name__}; expected a list of blocks that each "
            "hold an attention module. Please report this class."
        )
    text_config = config.get_text_config()
    vision = read_tower("vision", vision_blocks, paths, config.vision_config, packed=family.packed)
    return Anatomy(
        model_type=config.model_type,
        family=family,
        vision=vision,
        language=read_tower("language", language_blocks, paths, text_config, packed=False),
        projector=find_projector(model, family),
        feeds=family.feed_layers(config, vision.n_layers),
        drops=family.drops(config),
        merge=family.merge(config),
        final_norm=paths[id(find_final_norm(decoder))],
        head=paths[id(model.get_output_embeddings())],
        image_token_id=find_image_token_id(config),
        vocab=int(text_config.vocab_size),
    )


def check_kernels(config: Any) -> None:
    """Refuse flex attention, whose masks are no tensors: calls cannot be asked with others.

    Raises:
        ModelError: If a tower uses it.
    """
    towers = (("vision", config.vision_config), ("language", config.get_text_config()))
    for tower, part in towers:
        if "flex" in kernel_of(part):
            raise ModelError(
                f"Got attn_implementation={kernel_of(part)!r} in the {tower} tower; expected 'sdpa', "
                "'eager' or a flash kernel, whose calls can be asked again with other tensors. Write "
                "attn_implementation='sdpa' where the model is loaded, or "
                "model.set_attn_implementation('sdpa')."
            )


def check_model(model: Any) -> Any:
    """The model's config, if it is a vision-language model of transformers.

    Raises:
        ModelError: If it is not.
    """
    check_unwrapped(model)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"Got {type(model).__name__}; expected a transformers model. Write "
            "ss.LVLM.from_pretrained(name) to load one by name."
        )
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ModelError(
            f"Got a {type(model).__name__}; expected a transformers image-text-to-text model with a "
            "config and get_decoder(). Write AutoModelForImageTextToText.from_pretrained(...)."
        )
    if getattr(config, "vision_config", None) is None:
        raise ModelError(
            f"Got a {type(model).__name__} (model_type {config.model_type!r}) without a vision "
            "tower; expected a vision-language model. For a text-only model use TransformerLens or "
            "nnsight directly."
        )
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ModelError(
            f"Got a {type(model).__name__} without an LM head; expected the "
            "...ForConditionalGeneration class. Write AutoModelForImageTextToText.from_pretrained(...)."
        )
    return config


def find_blocks(root: nn.Module, skip: set[int] | None = None) -> list[nn.Module]:
    """The longest list whose every entry holds attention, preferring calls that can be read.

    Args:
        root: Where to look.
        skip: Ids of modules to leave out.
    """
    best: tuple[tuple[bool, int], list[nn.Module]] = ((False, 0), [])
    for module in root.modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if skip is not None and id(module) in skip:
            continue
        inner = [attention_child(block) for block in module]
        if all(child is not None for child in inner):
            readable = any(child is not None and calls_attention(child) for child in inner)
            if (readable, len(module)) > best[0]:
                best = ((readable, len(module)), list(module))
    return best[1]


def attention_child(block: nn.Module) -> nn.Module | None:
    """The direct child that calls attention, or else the one that is named after it."""
    named = None
    for name, child in block.named_children():
        if calls_attention(child):
            return child
        is_named = ("attn" in name or "attention" in name) and "norm" not in name
        if named is None and is_named:
            named = child
    return named


def mlp_child(block: nn.Module, attention: nn.Module, path: str) -> nn.Module:
    """The direct child that is no attention and no norm and holds the most parameters.

    Raises:
        ModelError: If there is none.
    """
    others = [
        child
        for name, child in block.named_children()
        if child is not attention and "norm" not in name.lower()
    ]
    if not others:
        raise ModelError(
            f"{path} ({type(block).__name__}) holds nothing but attention and norms; expected an "
            "MLP beside them. Please report this class."
        )
    # Weights in 8 bit are buffers.
    return max(others, key=lambda m: sum(x.numel() for x in (*m.parameters(), *m.buffers())))


def neuron_map(mlp: nn.Module, width: int) -> tuple[nn.Module, int] | None:
    """The MLP's last linear map into the residual stream, whose input are the neurons.

    Any layer counts that says how wide it is. An adapter or a wrapper around one holds maps of lower
    rank too, and its input is what all of them read: so the widest map is taken, and then the
    outermost module around it that holds no map which reads the stream.

    Args:
        mlp: The MLP.
        width: Width of the residual stream.

    Returns:
        The map and the number of neurons, or None if there is none.
    """
    maps: dict[str, tuple[int, int]] = {}
    for path, module in mlp.named_modules():
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if path and isinstance(sizes[0], int) and isinstance(sizes[1], int):
            maps[path] = (sizes[0], sizes[1])
    into = [(size[0], i, path) for i, (path, size) in enumerate(maps.items()) if size[1] == width]
    if not into:
        return None
    neurons, _, path = max(into)
    while around := path.rpartition(".")[0]:
        inside = [size[0] for other, size in maps.items() if other.startswith(f"{around}.")]
        if maps.get(around) != (neurons, width) and width in inside:
            break
        path = around
    return mlp.get_submodule(path), neurons


def output_projection(attention: nn.Module) -> nn.Module | None:
    """The module that maps head outputs back to the residual stream."""
    for name in OUTPUT_PROJECTIONS:
        child = getattr(attention, name, None)
        if isinstance(child, nn.Module):
            return child
    return None


def read_tower(
    tower: str, blocks: list[nn.Module], paths: dict[int, str], config: Any, *, packed: bool
) -> TowerAnatomy:
    """Read one tower."""
    pairs = [(block, child) for block in blocks if (child := attention_child(block)) is not None]
    projections = [output_projection(child) for _, child in pairs]
    mlps = [mlp_child(block, child, paths[id(block)]) for block, child in pairs]
    branches = [
        read_branches(paths[id(block)], block, child, mlp, config.hidden_size)
        for (block, child), mlp in zip(pairs, mlps, strict=True)
    ]
    neurons = [neuron_map(mlp, config.hidden_size) for mlp in mlps]
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    return TowerAnatomy(
        tower=tower,
        blocks=tuple(paths[id(block)] for block, _ in pairs),
        attention=tuple(paths[id(child)] for _, child in pairs),
        mlp=tuple(paths[id(mlp)] for mlp in mlps),
        attention_out=tuple(attention for attention, _ in branches),
        mlp_out=tuple(mlp for _, mlp in branches),
        neurons=tuple("" if last is None else paths[id(last[0])] for last in neurons),
        projection=tuple("" if p is None else paths[id(p)] for p in projections),
        calls=tuple(look_for_attention_call(child, paths[id(child)]) for _, child in pairs),
        d_model=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        packed=packed,
        kernel=kernel_of(config),
        learned_sink=any(
            name.rpartition(".")[2] in ("sinks", "sink", "s_aux")
            for _, child in pairs
            for name, _ in child.named_parameters()
        ),
        softcap=any(
            getattr(child, "attn_logit_softcapping", None) is not None for _, child in pairs
        ),
        d_mlp=min(0 if last is None else last[1] for last in neurons),
    )


def find_final_norm(decoder: nn.Module) -> nn.Module:
    """The decoder's last child named after a norm.

    Raises:
        ModelError: If there is none.
    """
    norms = [child for name, child in decoder.named_children() if "norm" in name]
    if not norms:
        raise ModelError(
            f"{type(decoder).__name__} has no final norm; expected a child named after one. Please "
            "report this class."
        )
    return norms[-1]


def find_projector(model: nn.Module, family: Family) -> str:
    """The projector's path, checked to exist.

    Raises:
        ModelError: If it is not where the family's row says.
    """
    names = dict(model.named_modules())
    for path in family.projector:
        if path in names:
            return path
    raise ModelError(
        f"{type(model).__name__} has no module at {family.projector}; expected the projector of the "
        f"{family.name} family there."
    )


def find_image_token_id(config: Any) -> int:
    """``image_token_id``, or ``image_token_index`` in old configs.

    Raises:
        ModelError: If the config names neither.
    """
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ModelError("The config names no image_token_id; expected one to find image positions.")
