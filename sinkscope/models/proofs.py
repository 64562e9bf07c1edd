"""Prove the sites on the model itself: one plain pass with hooks, and one with the probes it allows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.anatomy.attention_call import AttentionCall
from sinkscope.anatomy.block_sum import no_branch
from sinkscope.anatomy.towers import SIZES, BlockProof, HeadProof, TowerAnatomy
from sinkscope.anatomy.weights import dtype_of
from sinkscope.errors import ModelError
from sinkscope.kernels.residual import logits_of
from sinkscope.models.inputs import Sample
from sinkscope.models.watching import Seen, Watch
from sinkscope.models.wrapping import ONE_AT_A_TIME, on_device, undisturbed
from sinkscope.probes.attention import AttentionMass

WORKS = "Probes of states still work there."
Proofs = tuple[dict[str, tuple[BlockProof, ...]], HeadProof]
"""What was shown of the blocks of each tower, and of the head."""


def verify_anatomy(lvlm: Any, sample: Sample) -> Proofs:
    """See in two passes whether the sites of an `LVLM` are what they are called.

    A block in which one is not loses that capability, with the reason. ModelError if two passes differ,
    NonFiniteError if logits are NaN.
    """
    anatomy, module = lvlm.anatomy, lvlm.module
    with _few_threads(module), _not_by_chance(lvlm, sample):
        watch = Watch(module, anatomy, packed=sample.tokens.vision.layout is not None)
        with watch.on(), torch.no_grad(), undisturbed(module):
            logits = module(**on_device(sample.inputs, lvlm.device)).logits
        towers = (anatomy.vision, anatomy.language)
        proofs = {tower.tower: _judged(watch, tower, sample) for tower in towers}
        with torch.no_grad(), undisturbed(module):
            lens = _lens(watch, logits, proofs["language"][-1].states)
        proven = anatomy.proven(proofs, lens)
        every: dict[tuple[str, int], AttentionMass] = {}
        for tower in (proven.vision, proven.language):
            for layer in tower.attending:
                probe = AttentionMass({"all": "all"}, layer, tower=tower.tower, null=False)
                every[tower.tower, layer] = probe
        run = lvlm.run(sample, probes=list(every.values()), logits="last", remote=False)
    rows, length = _tokens(watch, "vision", sample)
    padded = int(sample.tokens.vision.live.sum()) < rows * length
    for (tower, layer), probe in every.items():
        known = proven.tower(tower)
        less = known.learned_sink or (tower == "vision" and padded)
        if why := _off(lvlm, known, layer, run[probe].mass, less=less):
            blocks = list(proofs[tower])
            blocks[layer] = replace(blocks[layer], attention=why)
            proofs[tower] = tuple(blocks)
    return proofs, lens


@contextmanager
def _not_by_chance(lvlm: Any, sample: Sample) -> Iterator[None]:
    """Where passes inside draw random numbers, refuse a model of which two passes differ."""

    def state() -> Tensor:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return torch.cat([torch.get_rng_state(), *cuda])

    before = state()
    try:
        yield
    finally:
        if not torch.equal(before, state()):
            first, second = (lvlm.run(sample, logits="last", remote=False).logits for _ in "12")
            off = float((first - second).abs().max())
            if not off <= 1e-2 * float(first.abs().max()):
                got = f"Two passes differ by {off:.3g}: they draw random numbers in evaluation mode"
                write = "Give training=self.training to dropout, or verify=False."
                raise ModelError(f"{got}; expected equal ones. {write}")


@contextmanager
def _few_threads(module: nn.Module) -> Iterator[None]:
    """One thread for the short passes of a small model, where several wait for one another."""
    with ONE_AT_A_TIME:  # the number of threads belongs to the process
        before = torch.get_num_threads()
        if sum(p.numel() for p in module.parameters()) <= 1_000_000_000:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _off(lvlm: Any, tower: TowerAnatomy, layer: int, mass: Tensor, *, less: bool) -> str:
    """Why the mass on all tokens is not one, or ``less`` where something else may be attended; "" if it is."""
    half = dtype_of(lvlm.module.get_submodule(tower.blocks[0])) != torch.float32
    tolerance = 2e-2 if half else 1e-3
    off = (mass - 1 if less else (mass - 1).abs()).nan_to_num().amax()
    if off <= tolerance:
        return ""
    return (
        f"In {tower.attention[layer]} attention over all {tower.tower} tokens sums to 1 +- {off:.3g}; "
        f"expected 1 within {tolerance}: the call found is not the one that attends. {WORKS}"
    )


def _tokens(watch: Watch, tower: str, sample: Sample) -> tuple[int, ...]:
    """How many rows and tokens the blocks of a tower are to have; (0, 0) where that is not known."""
    if tower == "language":
        return tuple(sample.tokens.ids.shape)
    vision = sample.tokens.vision
    if vision.layout is None:
        return tuple(vision.live.shape)
    feeding = watch.seen["vision", watch.anatomy.feed_layers[-1]].states
    return (1, torch.Size(feeding[-1][:-1]).numel()) if feeding else (0, 0)


def _judged(watch: Watch, tower: TowerAnatomy, sample: Sample) -> tuple[BlockProof, ...]:
    """What a pass has shown of every block of a tower."""
    shape, out, latest = _tokens(watch, tower.tower, sample), [], 0
    packed = tower.tower == "vision" and watch.packed
    padding = shape[1] - int(sample.tokens.vision.live.sum()) if packed else 0
    for layer, name in enumerate(tower.blocks):
        seen, block = watch.seen[tower.tower, layer], watch.module.get_submodule(name)
        why = ""
        if len(seen.began) != 1:
            why = f"it ran {len(seen.began)} times in a pass with a picture; expected once"
        elif seen.began[0] < latest:
            why = "it ran before the block in front of it; expected them in their order"
        elif not shape[1]:
            why = "what its tokens are was not measured; expected a map of ViT tokens"
        latest = max([latest, *seen.began])
        spatial = len(seen.states[0]) == 4 if seen.states else False
        states = why or _states(seen, shape, tower.d_model, packed)
        attention = added = writes = ""
        if isinstance(tower.calls[layer], AttentionCall):
            calls = f"{name} has no attention that can be read: {why}. {WORKS}"
            attention = calls if why else _calls(seen, shape, tower.attention[layer])
            if padding and not attention:
                got = f"{name} attends to {padding} tokens of padding in one sequence of images"
                attention = f"{got}; expected live tokens only. {WORKS}"
        if layer in tower.adding and (off := states or seen.off):
            added = no_branch(name, block, off.partition(";")[0]).reason
        if tower.projection[layer] and seen.calls and not attention and not seen.reads:
            writes = _other_writes(tower.projection[layer], seen.reads)
        sizes = None
        if seen.calls and not attention:
            query, key, value = seen.calls[0]
            sizes = query[1], key[1], value[-1]
        out.append(BlockProof(states, attention, added, writes, sizes, seen.follows, spatial))
    return tuple(out)


def _states(seen: Seen, shape: tuple[int, ...], width: int, packed: bool) -> str:
    """Why a block's input and output are not one state per token, or ""."""
    for found in seen.states:
        rows = found[:-1]
        flat = (rows[0], torch.Size(rows[1:]).numel()) if len(rows) == 3 and not packed else rows
        flat = (1, *rows) if packed and len(rows) == 1 else flat
        if flat != shape or found[-1] != width or len(found) != len(seen.states[0]):
            return f"its states are {list(found)}; expected one per token, {[*shape, width]}"
    return ""


def _calls(seen: Seen, shape: tuple[int, ...], path: str) -> str:
    """Why a block's attention is not that of its tokens, or ""."""
    if seen.attended != 1 or not seen.calls:
        got = f"{path} ran {seen.attended} times and called attention {len(seen.calls)} times in a pass"
        return f"{got}; expected one run. {WORKS}"
    rows = {size[0] for call in seen.calls for size in call}
    for at, what in ((0, "queries"), (1, "keys")):
        count = sum(call[at][2] for call in seen.calls)
        if (rows, count) != ({shape[0]}, shape[1]):
            got = f"The {what} of {path} are {count} in {max(rows)} rows"
            return f"{got}; expected the {shape[1]} tokens of {shape[0]} rows. {WORKS}"
    return ""


def _other_writes(path: str, reads: bool | None) -> str:
    """Why what heads write cannot be followed."""
    lies = "between attention and it lies more than a reshape (a gate, a norm, another map)"
    lies = "it does not read attention's output in a pass" if reads is None else lies
    return (
        f"What heads write through {path} cannot be followed: {lies}; expected a projection of the heads "
        "themselves. AttentionMass and ValueNorms work there."
    )


def _lens(watch: Watch, logits: Tensor, states: str) -> HeadProof:
    """How the last block's output becomes the logits of the last position; ``states`` is why it is none."""
    layer, made = watch.last["language"]
    norm, get = watch.norm, watch.module.get_submodule
    if states or not norm or layer != watch.anatomy.language.n_layers - 1:
        why = f"the last block's output is no state: {states}".partition(";")[0]
        why = why if states else "no final norm reads what the last block writes"
        return HeadProof(watch.anatomy.final_norm, why=why)
    normed, head = get(norm)(made[:, -1:]), get(watch.anatomy.head)
    if getattr(head, "in_features", normed.shape[-1]) == normed.shape[-1]:
        declared, config = watch.anatomy.lens, watch.module.config.get_text_config()
        if fitting := _fit(head(normed), logits[:, -1:], declared, config):
            return HeadProof(norm, *fitting)
    why = f"the head on {norm} of the last block's output does not give the model's logits"
    return HeadProof(norm, why=why)


def _fit(
    ours: Tensor, theirs: Tensor, declared: HeadProof, config: Any
) -> tuple[float, float] | None:
    """The scale and the soft-cap by which logits of the head are those of the model, the declared ones if
    they fit; or None."""
    limit = 1e-4 if theirs.dtype == ours.dtype == torch.float32 else 2e-2
    ours, theirs = ours.cpu().double(), theirs.cpu().double()  # MPS has no fp64
    numbers = [float(n) for n in vars(config).values() if isinstance(n, (int, float)) and n > 0]
    if ours.shape != theirs.shape:
        return None
    tries = [(declared.scale, declared.cap)]
    for cap in (0.0, *(n for name, n in vars(config).items() if "logit_softcap" in name and n)):
        straight = cap * (theirs / cap).clamp(-1 + 1e-9, 1 - 1e-9).atanh() if cap else theirs
        fitted = float((straight * ours).sum() / ours.square().sum())
        known = [n for one in numbers for n in (one, 1 / one) if abs(n / fitted - 1) < 1e-3]
        tries += [(scale, cap) for scale in (*known, fitted)]
    fits = (
        (logits_of(ours, *one) - theirs).abs().max() <= limit * theirs.abs().max() for one in tries
    )
    return next((one for one, fit in zip(tries, fits, strict=True) if fit), None)


def told(lvlm: Any) -> str:
    """Whether a pass has proven the anatomy, and what of it in every block."""
    towers = [tower for tower in (lvlm.anatomy.vision, lvlm.anatomy.language) if tower.blocks]
    if not lvlm.verified:
        if lvlm.device.type == "meta":
            return "no: declared, the weights are elsewhere"
        made = lvlm.anatomy.measured or len(towers) == 1
        return "no: loaded with verify=False" if made else "no: no picture could be made for it"

    def all_of(name: str) -> bool:
        return all(len(getattr(tower, name)) == tower.n_layers for tower in towers)

    shown = {
        "attention sums to 1": all_of("attending"),
        "blocks add attn_out and mlp_out": all_of("adding"),
        "states are one per token": all_of("stating"),
        "the lens of the last block is the logits": not lvlm.anatomy.lens.why,
    }
    lacking = "" if all(shown.values()) else "; what is not proven is unavailable below"
    return "yes: " + ", ".join(word for word in shown if shown[word]) + lacking


def differences(tower: TowerAnatomy) -> Iterator[str]:
    """Where blocks of a tower are not as all others."""
    breaks = [i for i, proof in enumerate(tower.proofs[:-1]) if not proof.follows]
    if breaks:
        yield (
            f"In the {tower.tower} tower something is added or changed between blocks: resid_post is not the "
            f"next block's resid_pre behind {blocks_of(breaks)}."
        )
    for name, found in ((name, tower.by_size(name, tower.attending)) for name in SIZES):
        if len(found) > 1:
            each = ", ".join(f"{number} in {blocks_of(few)}" for number, few in found.items())
            yield f"Blocks of the {tower.tower} tower differ in {name}: {each}."


def blocks_of(layers: Iterable[int]) -> str:
    """The numbers of some blocks in words: ``blocks 0-2 and 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    words = ["-".join(map(str, run)) for run in runs] or ["none"]
    many = len(words) > 1 or "-" in words[0]
    return f"block{'s' * many} " + " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
