"""Read a model's anatomy from its module tree: decoder, the other list of blocks, and projector."""

from typing import Any

import torch
from torch import nn

from sinkscope.anatomy.attention_call import calls_attention, kernel_of, read_attention_call
from sinkscope.anatomy.block_sum import read_branches
from sinkscope.anatomy.families import family_of
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.errors import ModelError

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "proj", "dense", "wo")
LEARNED_SINKS = ("sinks", "sink", "s_aux")


def read_anatomy(model: Any) -> Anatomy:
    """Find the anatomy of an image-text-to-text model of ``transformers``; meta tensors suffice. ModelError
    if there is no vision tower, decoder or known projector, or a kernel is not supported."""
    if wrong := _wrong_with(model):
        raise ModelError(f"Got a {type(model).__name__}{wrong}")
    config = model.config
    check_kernels(config)
    family, text = family_of(config.model_type), config.get_text_config()
    paths = {id(module): path for path, module in model.named_modules()}
    decoder: nn.Module = model.get_decoder()
    kind = type(model).__name__
    blocks = f"blocks in {kind}; expected a list of blocks that each hold an attention module"
    language = found(find_blocks(decoder), f"decoder {blocks}")
    vision = found(find_blocks(model, {id(m) for m in decoder.modules()}), f"vision {blocks}")
    eye = read_tower("vision", vision, paths, config.vision_config, family.packed)
    norms = [paths[id(child)] for name, child in decoder.named_children() if "norm" in name]
    projectors = [path for path in family.projector if path in paths.values()]
    names = ("image_token_id", "image_token_index")  # the latter in old configs
    ids = [value for name in names if (value := getattr(config, name, None)) is not None]
    expected = f"module at {family.projector} in {kind}; expected the projector of {family.name}"
    return Anatomy(
        model_type=config.model_type,
        family=family,
        vision=eye,
        language=read_tower("language", language, paths, text, packed=False),
        projector=found(projectors, expected)[0],
        feeds=family.feed_layers(config, eye.n_layers),
        drops=family.drops(config),
        merge=family.merge(config),
        final_norm=found(norms, "final norm in the decoder; expected a child named after one")[-1],
        head=paths[id(model.get_output_embeddings())],
        image_token_id=int(found(ids, "image_token_id in the config; expected one")[0]),
        vocab=int(text.vocab_size),
    )


def found(things: list[Any], what: str) -> list[Any]:
    """The things, of which there is one at least; else ModelError."""
    if not things:
        raise ModelError(f"Found no {what}. Please report this class.")
    return things


def check_kernels(config: Any) -> None:
    """Refuse flex attention, whose masks are no tensors: calls cannot be asked with others."""
    for tower, part in (("vision", config.vision_config), ("language", config.get_text_config())):
        if "flex" in kernel_of(part):
            raise ModelError(
                f"Got attn_implementation={kernel_of(part)!r} in the {tower} tower; expected 'sdpa', "
                "'eager' or a flash kernel. Write model.set_attn_implementation('sdpa')."
            )


def _wrong_with(model: Any) -> str:
    """What wraps a model or one of its parts, or what it lacks; "" if it is as it should be."""
    kind, config = type(model), getattr(model, "config", None)
    inside = "; expected the transformers model inside, with the same weights. Write "
    if callable(getattr(kind, "get_base_model", None)):  # by peft, whose adapters stay on
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            return (
                " with an adapter that puts states of its own before the prompt; expected one that only "
                "changes weights, such as LoRA: sinkscope would not see those states."
            )
        return f"{inside}ss.LVLM(model.get_base_model(), processor)."
    for inner in ("_orig_mod", "module", "model"):  # of torch.compile, DataParallel, pipelines
        part = getattr(model, inner, None)
        wraps = isinstance(part, nn.Module) and not hasattr(kind, "get_decoder")
        if wraps and (hasattr(part, "get_decoder") or hasattr(type(part), "get_base_model")):
            return f"{inside}ss.LVLM(model.{inner}, processor)."
    if not isinstance(model, nn.Module):
        return "; expected a transformers model. Write ss.LVLM.from_pretrained(name) to load one."
    for path, part in model.named_modules():
        if "_orig_mod" in part._modules:
            return (
                f" in which {path} is compiled ({type(part).__name__}); expected the part itself, whose "
                "blocks have a place. Write part.compile(), or put part._orig_mod back."
            )
    write = "Write AutoModelForImageTextToText.from_pretrained(...)."
    if config is None or not hasattr(model, "get_decoder"):
        needs = "a transformers image-text-to-text model with a config and get_decoder()"
        return f"; expected {needs}. {write}"
    if getattr(config, "vision_config", None) is None:
        return (
            f" (model_type {config.model_type!r}) without a vision tower; expected a vision-language "
            "model. For a text-only model use TransformerLens or nnsight directly."
        )
    head: Any = getattr(model, "get_output_embeddings", lambda: None)
    lacks = f" without an LM head; expected the ...ForConditionalGeneration class. {write}"
    return lacks if head() is None else ""


def find_blocks(root: nn.Module, skip: set[int] | frozenset[int] = frozenset()) -> list[nn.Module]:
    """The longest list outside ``skip`` (ids) whose every entry holds attention, best with calls."""
    found: dict[tuple[bool, int], list[nn.Module]] = {(False, 0): []}
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and len(module) and id(module) not in skip:
            inner = [child for block in module if (child := attention_child(block)) is not None]
            if len(inner) == len(module):
                readable = any(calls_attention(child) for child in inner)
                found.setdefault((readable, len(module)), list(module))
    return found[max(found)]


def attention_child(block: nn.Module) -> nn.Module | None:
    """The direct child that calls attention, or else the first one that is named after it."""
    children = dict(block.named_children())
    named = [n for n in children if ("attn" in n or "attention" in n) and "norm" not in n]
    calling = [child for child in children.values() if calls_attention(child)]
    return next(iter([*calling, *map(children.get, named)]), None)


def neuron_map(mlp: nn.Module, width: int) -> tuple[nn.Module, int] | None:
    """The MLP's widest linear map into the stream (adapters hold narrower ones), in the outermost module
    around it that holds no map which reads the stream; and how many neurons it reads."""
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


def read_tower(
    tower: str, blocks: list[nn.Module], paths: dict[int, str], config: Any, packed: bool
) -> TowerAnatomy:
    """Read one tower. A block's MLP is the child of most parameters that is no attention and no norm."""
    where, width = [paths[id(block)] for block in blocks], config.hidden_size
    attentions = [child for block in blocks if (child := attention_child(block)) is not None]
    mlps: list[nn.Module] = []
    for block, attention, path in zip(blocks, attentions, where, strict=True):
        children = [child for name, child in block.named_children() if "norm" not in name.lower()]
        what = f"MLP in {path} ({type(block).__name__}); expected one besides attention and norms"
        others = found([child for child in children if child is not attention], what)
        weights = [sum(x.numel() for x in (*m.parameters(), *m.buffers())) for m in others]
        mlps.append(others[weights.index(max(weights))])  # weights in 8 bit are buffers
    neurons = [neuron_map(mlp, width) for mlp in mlps]
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    names = [name for child in attentions for name, _ in child.named_parameters()]

    def path_of(module: nn.Module) -> str:
        return paths[id(module)]

    def projection(attention: nn.Module) -> str:
        children = (getattr(attention, name, None) for name in OUTPUT_PROJECTIONS)
        return next((path_of(one) for one in children if isinstance(one, nn.Module)), "")

    parts = zip(where, blocks, attentions, mlps, strict=True)
    return TowerAnatomy(
        tower=tower,
        blocks=tuple(where),
        attention=tuple(map(path_of, attentions)),
        mlp=tuple(map(path_of, mlps)),
        branches=tuple(read_branches(*part, width) for part in parts),
        neurons=tuple("" if last is None else path_of(last[0]) for last in neurons),
        projection=tuple(map(projection, attentions)),
        calls=tuple(read_attention_call(child, path_of(child)) for child in attentions),
        d_model=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_head=getattr(config, "head_dim", None) or width // heads,
        packed=packed,
        kernel=kernel_of(config),
        learned_sink=any(name.rpartition(".")[2] in LEARNED_SINKS for name in names),
        softcap=any(getattr(c, "attn_logit_softcapping", None) is not None for c in attentions),
        d_mlp=min(0 if last is None else last[1] for last in neurons),
    )


def device_of(part: nn.Module) -> torch.device:
    """Where a part computes; offloaded weights lie elsewhere between two passes."""
    hook = getattr(part, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(part.parameters()).device


def dtype_of(part: nn.Module) -> torch.dtype:
    """The dtype in which a part computes: that of its first weights that are no integers."""
    return next(p.dtype for p in part.parameters() if p.is_floating_point())
