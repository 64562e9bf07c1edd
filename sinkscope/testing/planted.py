"""Vision-language models whose sinks we put there: known tokens, layers, dimensions and sub-modules.

A planted model is an ordinary ``LlavaForConditionalGeneration``. The sinks are in its weights and show
for every image and every text; `sinkscope.testing.circuits` draws how they are made.
"""

from collections import Counter
from typing import Any

import torch
import transformers as hf

from sinkscope.checks import check_choice, check_whole
from sinkscope.errors import InputError
from sinkscope.testing import circuits
from sinkscope.testing.circuits import GRID, PATCH, PATCH_KINDS, Planted, Truth, Writer
from sinkscope.testing.processors import llava_processor
from sinkscope.testing.surgery import operate
from sinkscope.testing.tiny import llava_config, text_settings, vision_config

VISION_WIDTH = 128
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
        v_sinks: Patches, 0..63, that spike in the ViT.
        l_sinks: Patches that spike in the LLM; one that is also a V-sink makes an overlap.
        text_sinks: Plant the BOS token too.
        spike_decoys: Patches with a full spike, in both towers, that draws no attention.
        attention_decoys: Patches that draw attention in both towers without any spike.
        v_layer: ViT block that writes the spike, 0..vision_layers - 2; `l_layer` the same in the LLM.
        v_dims: Sink channels of the ViT (width 128); the first carries the largest entry.
        l_dims: Sink channels of the LLM. With two or more, BOS spikes most in the second and has a
            head of its own; with one it shares the L-sinks' head.
        strength: 0 to 1. Scales the sinks' spikes (largest entry about 600 at 1), the size with which
            V-sinks enter the LLM, and the keys that read them (logit 7 at 1); not the decoys. Going
            down, the 1000 x median rule is lost near 0.5, five times uniform attention near 0.3,
            |h| > 100 near 0.2, and the RMS score of the sink dims only near 0.02.
        d_model: Width of the LLM, a multiple of 128; an RMS score is at most its square root.
        seed: Of background weights, free channels and signs.
        attn_implementation: ``"eager"`` can return attention weights.

    Several sinks of one kind share a head, so with n of them each takes about 1/n of it. InputError for
    what is out of range, and for decoys that are also sinks.
    """
    check_choice(("clip", "siglip"), layout=layout)
    check_choice(WRITERS, v_written_by=v_written_by)
    later = "A later block must be able to attend to the sink."
    check_whole(0, vision_layers - 2, hint=later, v_layer=v_layer)
    check_whole(0, layers - 2, hint=later, l_layer=l_layer)
    counted = Counter([*{*v_sinks, *l_sinks}, *spike_decoys, *attention_decoys])
    shared = sorted(patch for patch, count in counted.items() if count > 1)
    patches, dims = f"distinct patches in 0..{GRID**2 - 1}", "1 to 8 distinct channels in 0.."
    for given, good, expected in (
        (f"v_sinks={v_sinks}", _distinct(v_sinks, GRID**2), patches),
        (f"l_sinks={l_sinks}", _distinct(l_sinks, GRID**2), patches),
        (f"spike_decoys={spike_decoys}", _distinct(spike_decoys, GRID**2), patches),
        (f"attention_decoys={attention_decoys}", _distinct(attention_decoys, GRID**2), patches),
        (f"decoys at {shared}", not shared, "neither a sink nor the other kind of decoy there"),
        (f"strength={strength}", 0 <= strength <= 1, "a number from 0 (no spike) to 1"),
        (f"d_model={d_model}", d_model >= 128 and d_model % 128 == 0, "a multiple of 128"),
        (f"v_dims={v_dims}", _distinct(v_dims, VISION_WIDTH, 8), f"{dims}{VISION_WIDTH - 1}"),
        (f"l_dims={l_dims}", _distinct(l_dims, d_model, 8), f"{dims}{d_model - 1}"),
    ):
        if not good:
            raise InputError(f"Got {given}; expected {expected}.")
    generator = torch.Generator().manual_seed(seed)
    vision = circuits.VisionChannels(v_dims, *_free(v_dims, VISION_WIDTH, generator)[:7])
    free = _free(l_dims, d_model, generator)
    language = circuits.LanguageChannels(l_dims, tuple(free[:6]), *free[6:13])
    l_only, overlap = {*l_sinks} - {*v_sinks}, {*l_sinks} & {*v_sinks}
    patches = (v_sinks, l_only, overlap, spike_decoys, attention_decoys)
    facts: Any = {kind: tuple(sorted(p)) for kind, p in zip(PATCH_KINDS, patches, strict=True)}
    facts |= {"text_sinks": text_sinks, "v_written_by": v_written_by, "l_written_by": "mlp"}
    facts |= {"v_layer": v_layer, "l_layer": l_layer, "v_dims": v_dims, "l_dims": l_dims}
    facts |= {"v_decoy_dim": vision.decoy, "l_decoy_dim": language.decoy, "strength": strength}
    processor = llava_processor(layout, GRID * PATCH, PATCH)
    text = text_settings(processor, layers, 4, 2, head_dim=d_model // 4)
    text |= {"intermediate_size": 256, "max_position_embeddings": 4096, "head_dim": d_model // 4}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    tower = vision_config(layout, vision_layers, GRID * PATCH, PATCH, VISION_WIDTH, 256)
    config = llava_config(layout, processor, tower, hf.LlamaConfig(**text, rope_parameters=rope))
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        model = hf.LlavaForConditionalGeneration(config).eval()
    planted = Planted(model, processor, Truth(layout, arrival_dims=language.arrival, **facts))
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
    d_model: int = 128,
    **how: Any,
) -> Planted:
    """`plant` with positions, layers, dimensions and writer drawn from `seed`.

    ``n_v`` V-sinks have no LLM spike, ``n_l`` L-sinks are no V-sinks, and ``n_overlap`` patches are both.
    ``how`` is text_sinks, strength and attn_implementation of `plant`. InputError for more than 64 patches.
    """
    counts = (n_v, n_l, n_overlap, n_spike_decoys, n_attention_decoys)
    if min(counts) < 0 or sum(counts) > GRID**2:
        raise InputError(f"Got n_v, n_l, ... = {counts}; expected counts of 0 or more, 64 in all.")
    generator = torch.Generator().manual_seed(seed)
    order = iter(torch.randperm(GRID**2, generator=generator).tolist())
    v_only, l_only, both, spikes, draws = (tuple(next(order) for _ in range(n)) for n in counts)
    v_layer, l_layer = (int(torch.randint(stop, (), generator=generator)) for stop in (4, 5))
    v_dims, l_dims = (tuple(_free((), width, generator)[:2]) for width in (VISION_WIDTH, d_model))
    drawn: Any = {"v_sinks": v_only + both, "l_sinks": l_only + both, "v_dims": v_dims}
    drawn |= {"spike_decoys": spikes, "attention_decoys": draws, "l_dims": l_dims}
    drawn |= {"v_layer": v_layer, "l_layer": l_layer, "seed": seed, "d_model": d_model}
    drawn["v_written_by"] = WRITERS[int(torch.randint(2, (), generator=generator))]
    return plant(layout, **drawn, **how)


def sink_free(
    layout: str = "clip", seed: int = 0, *, d_model: int = 128, attn_implementation: str = "sdpa"
) -> Planted:
    """Build the same kind of model with nothing planted: no spike, and no token draws attention."""
    how: dict[str, Any] = {"d_model": d_model, "attn_implementation": attn_implementation}
    return plant(layout, v_sinks=(), l_sinks=(), text_sinks=False, seed=seed, **how)


def _free(taken: tuple[int, ...], width: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(width, generator=generator).tolist()
    return [channel for channel in order if channel not in taken]


def _distinct(numbers: tuple[int, ...], below: int, most: int | None = None) -> bool:
    """Whether numbers differ and are in range, and with ``most`` 1 to so many of them."""
    good = len(set(numbers)) == len(numbers) and all(0 <= n < below for n in numbers)
    return good and (most is None or 1 <= len(numbers) <= most)
