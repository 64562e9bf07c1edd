"""Read a model's anatomy from its module tree: decoder, the other list of blocks, and projector."""

import inspect
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from sinkscope.anatomy.attention_call import (
    AttentionCall,
    NoAttentionCall,
    calls_attention,
    kernel_of,
    read_attention_call,
    source_of,
)
from sinkscope.anatomy.block_sum import no_branch, read_branches
from sinkscope.anatomy.families import HINTS, Family
from sinkscope.anatomy.towers import Anatomy, HeadProof, TowerAnatomy
from sinkscope.errors import ModelError, nearest

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "proj", "dense", "wo", "c_proj", "fc_out", "Wo")
OUTPUT_PROJECTIONS += ("projection", "projection_layer")
MLPS = ("mlp", "feed_forward", "ffn", "moe")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "d_head", "d_kv")
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "layer_norm")
SEEING = ("vision", "visual", "image", "vit")
LEARNED_SINKS = ("sinks", "sink", "s_aux")


def read_anatomy(model: Any) -> Anatomy:
    """Find the anatomy of a model of ``transformers`` with a decoder; meta tensors suffice. What the towers
    exchange is as the config declares it. ModelError if there is no decoder."""
    if wrong := _wrong_with(model):
        raise ModelError(f"Got a {type(model).__name__}{wrong}")
    config, hint = model.config, HINTS.get(model.config.model_type, Family())
    paths = {id(module): path for path, module in model.named_modules()}
    for name in ("vision_tower", "projector", "decoder"):
        if (path := getattr(hint, name)) not in ("", *paths.values()):
            got = f"Got the hint {name}={path!r} for {config.model_type!r}; expected the path of a module"
            raise ModelError(f"{got}. {nearest(path, list(paths.values()))}")
    decoder: nn.Module = model.get_submodule(hint.decoder) if hint.decoder else model.get_decoder()
    eye, ids = find_tower(model, decoder, hint.vision_tower), {id(m) for m in decoder.modules()}
    own = {id(m) for m in eye.modules()} if eye else set()
    blocks = find_blocks(decoder, own) or _longest(decoder, config.get_text_config(), own)
    language = read_tower("language", blocks, paths, config.get_text_config())
    if not language.blocks:
        kind = type(model).__name__
        raise ModelError(
            f"Found no list of blocks in the decoder of {kind}. Please report this class."
        )
    inside = ids - own if eye and id(eye) in ids else ids
    seen = find_blocks(eye, inside) if eye else []
    vision = read_tower("vision", seen, paths, getattr(config, "vision_config", None))
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
    known = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return Anatomy(
        model_type=config.model_type,
        vision=replace(vision, missing="" if seen else _why_blind(model, eye)),
        language=language,
        decoder=paths[id(decoder)],
        projector=hint.projector,
        feeds=_declared_feeds(config, vision.n_layers),
        lens=_declared_head(model, _final_norm(model, language.blocks[0])),
        head=paths[id(_head(model))],
        image_token_id=[*known, -1][0] if hint.image_token_id is None else hint.image_token_id,
        vocab=int(config.get_text_config().vocab_size),
    )


def find_tower(model: Any, decoder: nn.Module, hint: str) -> nn.Module | None:
    """The module that holds the vision blocks, or None: as hinted, as transformers names it, or by name."""
    if hint:
        return model.get_submodule(hint)
    named = getattr(model, "get_encoder", lambda **_: None)(modality="image")
    if named is not None and named not in (model, model.base_model, decoder):
        return named
    for path, part in model.named_modules():
        leaf = path.rpartition(".")[2].lower()
        if any(word in leaf for word in SEEING) and find_blocks(part):
            return part
    return None


def _why_blind(model: Any, eye: nn.Module | None) -> str:
    """Why a model has no vision blocks."""
    if eye is not None:
        return f"{type(eye).__name__} has no list of blocks that hold attention"
    has = getattr(model.config, "vision_config", None) is not None or "vq" in str(model.config)
    return "no vision tower was found" if has else "there is no vision tower"


def _longest(root: nn.Module, config: Any, skip: set[int]) -> list[nn.Module]:
    """The blocks of a decoder in which none holds attention: the longest list, or none."""
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and id(m) not in skip]
    right = [m for m in lists if len(m) == getattr(config, "num_hidden_layers", None)]
    return list(max(right or lists, key=len, default=nn.ModuleList()))


def _declared_feeds(config: Any, n_layers: int) -> tuple[int, ...]:
    """The vision blocks that feed the projector as a config has it: ``vision_feature_layer`` counts hidden
    states, so that -1 is the last block's output; several are concatenated in order."""
    chosen = getattr(config, "vision_feature_layer", None)
    chosen = -1 if chosen is None else chosen
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    blocks = tuple((i if i >= 0 else n_layers + 1 + i) - 1 for i in indices)
    if n_layers and (not blocks or min(blocks) < 0 or max(blocks) >= n_layers):
        raise ModelError(
            f"Got vision_feature_layer={chosen!r} with {n_layers} vision blocks; expected hidden "
            f"states from 1 to {n_layers}, or -1 to -{n_layers}."
        )
    return blocks if n_layers else ()


def _final_norm(model: Any, first: str) -> str:
    """The path of the norm behind the blocks, beside the list of which the path of the first is given."""
    around = first.rpartition(".")[0].rpartition(".")[0]
    children = dict(model.get_submodule(around).named_children())
    norms = [n for n, child in children.items() if "norm" in type(child).__name__.lower()]
    usual = [name for name in FINAL_NORMS if name in norms]
    last = (usual or norms[::-1] or [""])[0]
    return f"{around}.{last}" if around and last else last


def _declared_head(model: Any, norm: str) -> HeadProof:
    """How logits are made as a config has it, of the numbers that the model's own source names."""
    source, config = source_of(type(model).forward), model.config
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    said = [name in source and getattr(config.get_text_config(), name, None) for name in names]
    cap, scale, divisor = (float(value or 0.0) for value in said)
    return HeadProof(
        norm, (scale or 1.0) / (divisor or 1.0), cap, "" if norm else "no final norm was found"
    )


def _head(model: Any) -> nn.Module | None:
    """The LM head of a model or of the language model inside, or None."""
    for part in (model, getattr(model, "get_decoder", lambda: None)()):
        head = getattr(part, "get_output_embeddings", lambda: None)()
        if head is not None:
            return head
    return next((m for path, m in model.named_modules() if path.endswith("lm_head")), None)


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
    if getattr(config, "is_encoder_decoder", False):
        return (
            ", whose encoder reads the prompt and whose decoder reads the encoder; expected a decoder that "
            "reads prompt and image states in one sequence, as LLaVA's does."
        )
    lacks = f" without an LM head; expected the ...ForConditionalGeneration class. {write}"
    return lacks if _head(model) is None else ""


def find_blocks(root: nn.Module, skip: set[int] | frozenset[int] = frozenset()) -> list[nn.Module]:
    """The list outside ``skip`` (ids) most of whose entries hold attention, best with calls; else []."""
    best: tuple[int, ...] = (0, 0, 0)
    chosen: list[nn.Module] = []
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in skip:
            inner = [child for block in module if (child := attention_child(block)) is not None]
            size = (sum(bool(_calling(child)) for child in inner), len(inner), len(module))
            if inner and size > best:
                best, chosen = size, list(module)
    return chosen


def attention_child(block: nn.Module) -> nn.Module | None:
    """The direct child that calls attention, or else the first one that is named after it."""
    children = dict(block.named_children())
    named = [n for n in children if ("attn" in n or "attention" in n) and "norm" not in n]
    calling = [child for child in children.values() if calls_attention(child)]
    return next(iter([*calling, *map(children.get, named)]), None)


def _calling(attention: nn.Module) -> nn.Module | None:
    """The module that calls attention: the block's child, or the only one inside."""
    inside = [part for part in attention.modules() if calls_attention(part)]
    return inside[0] if len(inside) == 1 or (inside and inside[0] is attention) else None


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


def _parts(block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """What mixes the tokens of a block, attention where there is one, and its MLP: of the children that are
    no norms the one of most parameters besides."""
    children = [c for n, c in block.named_children() if "norm" not in n.lower()]
    mixer = attention_child(block)
    others = [child for child in children if child is not mixer]
    weights = [sum(x.numel() for x in (*m.parameters(), *m.buffers())) for m in others]
    mlp = others[weights.index(max(weights))] if any(weights) else None  # in 8 bit as buffers
    if mixer is None:
        heavy = [child for child, size in zip(others, weights, strict=True) if size]
        named = [c for n, c in block.named_children() if any(word in n for word in MLPS)]
        heavy.sort(key=lambda child: any(child is one for one in named))
        mixer, mlp = [*heavy[:1], None][0], [*heavy[1:], None][0]
    return mixer, mlp


def width_of(block: nn.Module, config: Any) -> int:
    """The width of the residual stream: that of the block's norms, or what the config says."""
    norms = [c for c in block.children() if "norm" in type(c).__name__.lower()]
    sizes = [
        w.shape[0] for n in norms if (w := getattr(n, "weight", None)) is not None and w.ndim == 1
    ]
    names = ("hidden_size", "d_model", "embed_dim", "n_embd")
    said = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return [*sizes, *said, 0][0]


def _number(names: tuple[str, ...], *things: Any) -> int | None:
    """The first whole number under one of the names in a module or config."""
    for thing in things:
        for name in names:
            with suppress(AttributeError, RuntimeError, ValueError):  # also if it differs by layer
                if isinstance(value := getattr(thing, name), int) and value > 0:
                    return int(value)
    return None


def _heads(attention: nn.Module, config: Any, width: int) -> tuple[int, int, int]:
    """Query heads, key-value heads and their width, of one attention module."""
    own = getattr(attention, "config", config)
    heads = _number(HEADS, attention, own, config) or 1
    out = getattr(getattr(attention, "q_proj", None), "out_features", None)
    size = _number(HEAD_SIZES, attention) or (out or width) // heads
    keys = getattr(getattr(attention, "k_proj", None), "out_features", None)
    kv_heads = keys // size if keys else _number(KV_HEADS, attention, own, config) or heads
    return heads, kv_heads, size


def read_tower(
    tower: str, blocks: list[nn.Module], paths: dict[int, str], config: Any
) -> TowerAnatomy:
    """Read one tower, whose blocks may differ; without blocks it is empty."""
    where = [paths[id(block)] for block in blocks]
    width = width_of(blocks[0], config) if blocks else 0
    mixers, mlps = zip(*map(_parts, blocks), strict=True) if blocks else ((), ())
    attentions = [one and (_calling(one) or one) for one in mixers]
    neurons = [None if mlp is None else neuron_map(mlp, width) for mlp in mlps]
    calls, projections, branches = [], [], []
    for path, block, mixer, own, mlp in zip(where, blocks, mixers, attentions, mlps, strict=True):
        if own is None:
            calls.append(
                NoAttentionCall(f"{path} has no attention; expected a module that attends")
            )
        else:
            calls.append(read_attention_call(own, paths[id(own)]))
        names = [getattr(part, name, None) for part in (own, mixer) for name in OUTPUT_PROJECTIONS]
        last = next((one for one in names if isinstance(one, nn.Module)), None)
        projections.append("" if last is None else paths[id(last)])
        if mixer is None or mlp is None:
            branches.append(no_branch(path, block, "it has not both attention and an MLP"))
        else:
            branches.append(read_branches(path, block, mixer, mlp, width))
    attending = [m for m, c in zip(attentions, calls, strict=True) if isinstance(c, AttentionCall)]
    first = next(iter([*attending, *attentions]), None)
    heads, kv_heads, size = (0, 0, 0) if first is None else _heads(first, config, width)
    names = [name for child in attentions if child for name, _ in child.named_parameters()]
    return TowerAnatomy(
        tower=tower,
        blocks=tuple(where),
        attention=tuple("" if one is None else paths[id(one)] for one in attentions),
        mlp=tuple("" if mlp is None else paths[id(mlp)] for mlp in mlps),
        branches=tuple(branches),
        neurons=tuple("" if last is None else paths[id(last[0])] for last in neurons),
        projection=tuple(projections),
        calls=tuple(calls),
        d_model=width,
        heads=heads,
        kv_heads=kv_heads,
        d_head=size,
        packed=any(map(_is_packed, blocks[:1])),
        kernel=kernel_of(getattr(first, "config", config)),
        learned_sink=any(name.rpartition(".")[2] in LEARNED_SINKS for name in names),
        softcap=any(getattr(c, "attn_logit_softcapping", None) is not None for c in attentions),
        d_mlp=min((0 if last is None else last[1] for last in neurons), default=0),
    )


def _is_packed(block: nn.Module) -> bool:
    """Whether all images share one sequence: the block is told where they end."""
    return "cu_seqlens" in inspect.signature(type(block).forward).parameters
