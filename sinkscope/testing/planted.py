"""Vision-language models whose sinks we put there: known tokens, layers, dimensions and sub-modules.

A planted model is an ordinary ``LlavaForConditionalGeneration``. The sinks are in its weights and show
for every image and every text; `sinkscope.testing.circuits` draws how they are made.
"""

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

from sinkscope.testing.circuits import LanguageChannels, VisionChannels
from sinkscope.testing.processors import llava_processor
from sinkscope.testing.surgery import operate
from sinkscope.testing.tiny import TOWERS, check_choice
from sinkscope.testing.truth import GRID, PATCH, Planted, Truth, Writer

VISION_WIDTH = 128
N_ARRIVAL = 6
WRITERS = ("mlp", "attention")


def plant(
    layout: str = "clip",
    *,
    v_sinks: tuple[int, ...] = (9, 46),
    l_sinks: tuple[int, ...] = (20,),
    text_sinks: bool = True,
    spike_decoys: tuple[int, ...] = (),
    attention_decoys: tuple[int, ...] = (),
    v_layer: int = 1,
    l_layer: int = 1,
    v_dims: tuple[int, ...] = (90, 17),
    l_dims: tuple[int, ...] = (41, 101),
    v_written_by: Writer = "mlp",
    strength: float = 1.0,
    d_model: int = 128,
    vision_layers: int = 5,
    layers: int = 6,
    seed: int = 0,
    attn_implementation: str = "sdpa",
) -> Planted:
    """Build a small LLaVA with exactly these sinks, in float32 and eval mode.

    Args:
        layout: ``"clip"`` (CLS, last-but-one block read) or ``"siglip"`` (no CLS, last block read).
        v_sinks: patches, 0..63, that spike in the ViT.
        l_sinks: patches that spike in the LLM; one that is also a V-sink makes an overlap.
        text_sinks: plant the BOS token too.
        spike_decoys: patches with a full spike, in both towers, that draws no attention.
        attention_decoys: patches that draw attention in both towers without any spike.
        v_layer: ViT block that writes the spike, 0..vision_layers - 2.
        l_layer: LLM block that writes the spike, 0..layers - 2.
        v_dims: sink channels of the ViT (width 128); the first carries the largest entry.
        l_dims: sink channels of the LLM. With two or more, BOS spikes most in the second and has a
            head of its own; with one it shares the L-sinks' head.
        v_written_by: ``"mlp"`` or ``"attention"``.
        strength: 0 to 1. Scales the sinks' spikes (largest entry about 600 at 1), the size with
            which V-sinks enter the LLM, and the keys that read them (logit 7 at 1); not the decoys.
            Going down, the 1000 x median rule of massive activations is lost near 0.5, five times
            the attention of a uniform pattern near 0.3, |h| > 100 near 0.2, and the RMS score of the
            sink dims only near 0.02, since a norm hides how large a spike is.
        d_model: width of the LLM, a multiple of 128; an RMS score is at most its square root.
        vision_layers: blocks of the ViT.
        layers: blocks of the LLM.
        seed: background weights, free channels and signs.
        attn_implementation: as in transformers; ``"eager"`` can return attention weights.

    Several sinks of one kind share a head, so with n of them each takes about 1/n of it.

    Raises:
        ValueError: patches, layers, dims, layout, writer, strength or width out of range; decoys
            that are also sinks.
    """
    _check(layout, v_written_by, strength, d_model)
    _check_patches(
        v_sinks=v_sinks,
        l_sinks=l_sinks,
        spike_decoys=spike_decoys,
        attention_decoys=attention_decoys,
    )
    _check_layer("v_layer", v_layer, "vision_layers", vision_layers)
    _check_layer("l_layer", l_layer, "layers", layers)
    _check_dims("v_dims", v_dims, VISION_WIDTH)
    _check_dims("l_dims", l_dims, d_model)
    generator = torch.Generator().manual_seed(seed)
    vision = VisionChannels(v_dims, *_free(v_dims, VISION_WIDTH, generator)[:7])
    free = _free(l_dims, d_model, generator)
    language = LanguageChannels(l_dims, tuple(free[:N_ARRIVAL]), *free[N_ARRIVAL : N_ARRIVAL + 7])
    truth = Truth(
        layout=layout,
        v_sinks=tuple(sorted(v_sinks)),
        l_sinks=tuple(sorted(set(l_sinks) - set(v_sinks))),
        overlap=tuple(sorted(set(l_sinks) & set(v_sinks))),
        text_sinks=text_sinks,
        spike_decoys=tuple(sorted(spike_decoys)),
        attention_decoys=tuple(sorted(attention_decoys)),
        v_layer=v_layer,
        l_layer=l_layer,
        v_dims=vision.sink,
        l_dims=language.sink,
        arrival_dims=language.arrival,
        v_decoy_dim=vision.decoy,
        l_decoy_dim=language.decoy,
        v_written_by=v_written_by,
        l_written_by="mlp",
        strength=strength,
    )
    processor = llava_processor(layout, GRID * PATCH, PATCH)
    model = _bare_model(layout, processor, d_model, vision_layers, layers, attn_implementation)
    planted = Planted(model, processor, truth)
    operate(planted, vision, language, generator)
    return planted


def random_plant(
    seed: int,
    layout: str = "clip",
    *,
    n_v: int = 2,
    n_l: int = 2,
    n_overlap: int = 0,
    n_spike_decoys: int = 1,
    n_attention_decoys: int = 1,
    text_sinks: bool = True,
    strength: float = 1.0,
    d_model: int = 128,
    attn_implementation: str = "sdpa",
) -> Planted:
    """`plant` with positions, layers, dimensions and writer drawn from `seed`.

    Args:
        seed: of everything drawn.
        layout: as in `plant`, as are the arguments after the counts.
        n_v: V-sinks without the LLM spike.
        n_l: L-sinks that are not V-sinks.
        n_overlap: V-sinks that also get the LLM spike.
        n_spike_decoys: patches with a spike and no attention.
        n_attention_decoys: patches with attention and no spike.
        text_sinks: see `plant`.
        strength: see `plant`.
        d_model: see `plant`.
        attn_implementation: see `plant`.

    Raises:
        ValueError: more patches asked for than the 64 there are, or what `plant` refuses.
    """
    counts = (n_v, n_l, n_overlap, n_spike_decoys, n_attention_decoys)
    if min(counts) < 0 or sum(counts) > GRID**2:
        raise ValueError(
            f"n_v, n_l, ... = {counts}: expected counts of 0 or more, {GRID**2} in all"
        )
    generator = torch.Generator().manual_seed(seed)
    order = iter(torch.randperm(GRID**2, generator=generator).tolist())
    v_only, l_only, both, spikes, draws = (tuple(next(order) for _ in range(n)) for n in counts)

    def below(stop: int) -> int:
        return int(torch.randint(stop, (), generator=generator))

    vision_layers, layers = 5, 6
    return plant(
        layout,
        v_sinks=v_only + both,
        l_sinks=l_only + both,
        text_sinks=text_sinks,
        spike_decoys=spikes,
        attention_decoys=draws,
        v_layer=below(vision_layers - 1),
        l_layer=below(layers - 1),
        v_dims=tuple(torch.randperm(VISION_WIDTH, generator=generator)[:2].tolist()),
        l_dims=tuple(torch.randperm(d_model, generator=generator)[:2].tolist()),
        v_written_by=WRITERS[below(2)],
        strength=strength,
        d_model=d_model,
        vision_layers=vision_layers,
        layers=layers,
        seed=seed,
        attn_implementation=attn_implementation,
    )


def sink_free(
    layout: str = "clip", seed: int = 0, *, d_model: int = 128, attn_implementation: str = "sdpa"
) -> Planted:
    """The same kind of model with nothing planted: no spike, and no token draws attention."""
    how: dict[str, Any] = {"d_model": d_model, "attn_implementation": attn_implementation}
    return plant(layout, v_sinks=(), l_sinks=(), text_sinks=False, seed=seed, **how)


def _bare_model(
    layout: str,
    processor: LlavaProcessor,
    d_model: int,
    vision_layers: int,
    layers: int,
    attn_implementation: str,
) -> LlavaForConditionalGeneration:
    """LLaVA of the planted shape, in eval mode, before surgery; the global RNG is untouched."""
    tokenizer, clip = processor.tokenizer, layout == "clip"
    vision_class = CLIPVisionConfig if clip else SiglipVisionConfig
    vision_config = vision_class(
        hidden_size=VISION_WIDTH,
        intermediate_size=256,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=GRID * PATCH,
        patch_size=PATCH,
    )
    if isinstance(vision_config, SiglipVisionConfig):
        vision_config.vision_use_head = False
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=d_model // 4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        image_seq_length=GRID**2,
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
    )
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        return LlavaForConditionalGeneration(config).eval()


def _free(taken: tuple[int, ...], width: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(width, generator=generator).tolist()
    return [channel for channel in order if channel not in taken]


def _check(layout: str, v_written_by: str, strength: float, d_model: int) -> None:
    check_choice("layout", layout, TOWERS)
    check_choice("v_written_by", v_written_by, WRITERS)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}; expected a number from 0 (no spike) to 1")
    if d_model < 128 or d_model % 128:
        raise ValueError(f"d_model={d_model}; expected a multiple of 128")


def _check_patches(**kinds: tuple[int, ...]) -> None:
    for name, patches in kinds.items():
        if len(set(patches)) < len(patches) or any(not 0 <= p < GRID**2 for p in patches):
            raise ValueError(f"{name}={patches}; expected distinct patches in 0..{GRID**2 - 1}")
    sinks = {*kinds["v_sinks"], *kinds["l_sinks"]}
    spikes, draws = set(kinds["spike_decoys"]), set(kinds["attention_decoys"])
    shared = (sinks & spikes) | (sinks & draws) | (spikes & draws)
    if shared:
        raise ValueError(
            f"patches {sorted(shared)} are named as decoy and as something else; a decoy is neither a "
            "sink nor the other kind of decoy"
        )


def _check_layer(name: str, layer: int, total_name: str, total: int) -> None:
    if not 0 <= layer <= total - 2:
        raise ValueError(
            f"{name}={layer} with {total_name}={total}; expected 0..{total - 2}, so that a later block "
            "can attend to the sink"
        )


def _check_dims(name: str, dims: tuple[int, ...], width: int) -> None:
    if not 1 <= len(set(dims)) == len(dims) <= 8 or any(not 0 <= d < width for d in dims):
        raise ValueError(f"{name}={dims}; expected 1 to 8 distinct channels in 0..{width - 1}")
