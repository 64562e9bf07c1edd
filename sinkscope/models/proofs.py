"""Prove the anatomy on the model itself: a part of a forward pass with a picture, and one of words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from sinkscope.anatomy.block_sum import NoBranch, no_branch
from sinkscope.anatomy.context import Context
from sinkscope.anatomy.discovery import device_of, dtype_of
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.errors import ModelError, NonFiniteError
from sinkscope.kernels import residual
from sinkscope.kernels.walk import factors_at, first_tensor, times
from sinkscope.models.inputs import Sample
from sinkscope.models.requests import plan_of
from sinkscope.models.runs import run_until_read
from sinkscope.models.wrapping import ONE_AT_A_TIME
from sinkscope.probes.attention import AttentionMass
from sinkscope.protocols import Read
from sinkscope.sites import Site, Tower

SMALL = 1_000_000_000  # parameters of a model that is verified on one thread of the CPU
LIMIT = 4.0
"""Rounding errors of the states' dtype by which two additions may be off; they make at most 2."""
TOKENS = 32  # how many tokens of a pass are looked at


@dataclass(frozen=True, eq=False)
class _States:
    """Whole states at a few sites, as the model lays them out; used here only."""

    sites: tuple[Site, ...]
    tower: str = "vision"

    def reads(self, context: Context) -> list[Read]:
        return [Read(site, residual.keep) for site in self.sites]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        return answers


def verify_anatomy(lvlm: Any) -> dict[tuple[str, int], NoBranch]:
    """Check that the sites of an `LVLM` are what they are called; ModelError if not, with the numbers.

    * attention mass over all live tokens sums to one in every block whose attention call was found;
    * what the projector reads is made of the vision blocks said to feed it, CLS dropped as said;
    * what the projector writes is found at the image positions of the decoder's input;
    * two passes compute the same, if a pass draws random numbers, and nothing is NaN.

    To save time the pass with a picture ends in the decoder's first block, and words alone go through.
    Returns ``(tower, layer) -> reason`` of the blocks that do not add just attn_out and mlp_out.
    """
    with _few_threads(lvlm.module), watched_sums(lvlm.module, lvlm.anatomy) as wrong:
        noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
        image = Image.fromarray(noise.to(torch.uint8).numpy())  # no two of its patches are alike
        sample = lvlm.prepare(images=image, text="a")
        with _not_by_chance(lvlm, sample):
            _check_picture(lvlm, sample)
            words, sums = _words_only(sample), _sums(lvlm, "language")
            run = lvlm.run(words, probes=sums, logits="last", remote=False)
    for probe in sums:
        _check_sum(lvlm, "language", run[probe].mass)
    return wrong


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
                raise ModelError(
                    f"Two passes differ by {off:.3g}: they draw random numbers in evaluation mode; "
                    "expected equal ones. Give training=self.training to dropout, or verify=False."
                )


@contextmanager
def _few_threads(module: nn.Module) -> Iterator[None]:
    """One thread for the short passes of a small model, where several wait for one another."""
    with ONE_AT_A_TIME:  # the number of threads belongs to the process
        before = torch.get_num_threads()
        if sum(p.numel() for p in module.parameters()) <= SMALL:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _sums(lvlm: Any, tower: Tower, most: int | None = None) -> list[AttentionMass]:
    """The mass on all tokens, in the first blocks whose attention call was found, or in all of them."""
    found = lvlm.anatomy.tower(tower).attending[:most]
    return [AttentionMass({"all": "all"}, found, tower=tower, null=False)] if found else []


def _check_picture(lvlm: Any, sample: Sample) -> None:
    """Vision tower, projector and the way into the decoder, on a prompt with a picture."""
    a, places = lvlm.anatomy, lvlm._places
    feeds = tuple(Site("vision", "resid_post", layer) for layer in a.feeds)
    ends = (Site("projector", "input"), Site("projector", "output"))
    states = _States((*feeds, *ends, Site("language", "resid_pre", 0)))
    probes = [states, *_sums(lvlm, "vision"), *_sums(lvlm, "language", most=1)]
    context = Context(a, sample.tokens)
    plan = plan_of(probes, (), context, lvlm)
    answers = run_until_read(places.here, places.placed(sample.inputs), plan)
    seen = answers[0]
    if not torch.isfinite(seen[ends[1]]).all():
        got = "The projector writes NaN or infinite states for a test image; expected finite ones."
        raise NonFiniteError(f"{got} Load the model in bfloat16 or float32 and check the weights.")
    _check_feed(lvlm, [seen[site] for site in feeds], seen[ends[0]])
    _check_projection(lvlm, sample, seen)
    for slot, probe in enumerate(probes[1:], start=1):
        _check_sum(lvlm, probe.tower, probe.finish(answers[slot], context).mass)


def _check_sum(lvlm: Any, tower: Tower, mass: Tensor) -> None:
    """The mass on all tokens is one, or less with a learned sink."""
    anatomy = lvlm.anatomy.tower(tower)
    half = dtype_of(lvlm.module.get_submodule(anatomy.blocks[0])) != torch.float32
    tolerance = 2e-2 if half else 1e-3
    off = (mass - 1 if anatomy.learned_sink else (mass - 1).abs()).nan_to_num().amax()
    if off > tolerance:
        raise ModelError(
            f"Attention over all {tower} tokens sums to 1 +- {off:.3g}; expected 1 within "
            f"{tolerance}. The attention call found is not the one that attends."
        )


def _words_only(sample: Sample) -> Sample:
    """The prompt of one row without its image positions, as the model takes text alone."""
    words = (sample.tokens.image < 0)[0]
    tensors = {n: x[:, words] for n, x in vars(sample.tokens).items() if isinstance(x, Tensor)}
    inputs = {name: sample.inputs[name][:, words] for name in ("input_ids", "attention_mask")}
    tokens = replace(sample.tokens, **tensors, words=None)
    return Sample(inputs, tokens, made_for=sample.made_for)


def _check_feed(lvlm: Any, feeds: list[Tensor], read: Tensor) -> None:
    """The projector's input is the feeding blocks' output, normed if so, without dropped tokens."""
    a = lvlm.anatomy
    made = torch.cat(feeds, dim=-1)
    if a.family.feed_norm:
        norm: Any = lvlm.module.get_submodule(a.family.feed_norm)
        with torch.no_grad():
            made = norm(made.to(device_of(norm), norm.weight.dtype)).float().cpu()
    made = made[:, a.drops :] if made.ndim == 3 and not a.vision.packed else made
    made, read = (rearrange(x, "... width -> (...) width") for x in (made, read))
    if not torch.equal(made, read):
        raise ModelError(
            f"The projector reads a tensor {tuple(read.shape)} that differs from the output of vision "
            f"blocks {a.feeds} without {a.drops} leading tokens {tuple(made.shape)}. Please report it."
        )


def _check_projection(lvlm: Any, sample: Sample, seen: Mapping[Site, Tensor]) -> None:
    """The projector's output reaches the image positions of the decoder's input."""
    read = seen[Site("language", "resid_pre", 0)][sample.tokens.image >= 0]
    # The model brings what the projector writes into the decoder's dtype.
    dtype = dtype_of(lvlm.module.get_input_embeddings())
    written = seen[Site("projector", "output")].reshape(-1, read.shape[-1]).to(dtype).float()
    same = written.shape == read.shape
    if not (same and torch.equal(written[torch.cdist(read, written).argmin(dim=1)], read)):
        raise ModelError(
            f"The projector writes {tuple(written.shape)}, but the decoder reads other states at "
            f"its {tuple(read.shape)} image positions; expected the same vectors."
        )


@contextmanager
def watched_sums(module: nn.Module, anatomy: Anatomy) -> Iterator[dict[tuple[str, int], NoBranch]]:
    """Compare ``resid_pre + attn_out + mlp_out`` with ``resid_post`` in every pass inside.

    Yields ``(tower, layer) -> reason`` of the blocks in which they differ, filled as they run.
    """
    wrong: dict[tuple[str, int], NoBranch] = {}
    with ExitStack() as stack:
        for tower in (anatomy.vision, anatomy.language):
            for layer in tower.adding:
                for handle in _watch(module, tower, layer, wrong):
                    stack.callback(handle.remove)
        yield wrong


def _watch(
    module: nn.Module, tower: TowerAnatomy, layer: int, wrong: dict[tuple[str, int], NoBranch]
) -> Iterator[Any]:
    """Hooks on a block and on what its branches add, which note where the sum is wrong."""
    parts: list[Tensor] = []
    path, get = tower.blocks[layer], module.get_submodule

    def begin(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        parts[:] = [args[0] if args else next(iter(kwargs.values()))]

    def adder(factors: tuple[str, ...]) -> Any:
        def note(part: nn.Module, args: Any, out: Any) -> None:
            states = first_tensor(out)
            parts.append(times(states, factors_at(module, factors, states.device)))

        return note

    def end(block: nn.Module, args: Any, out: Any) -> None:
        why = "attention or MLP did not run once in a pass"
        if len(parts) == 3:
            off = rounding_errors(parts, first_tensor(out))
            why = "" if off <= LIMIT else f"in a pass they differ by {off:.3g} rounding errors"
        parts.clear()
        if why:
            wrong[tower.tower, layer] = no_branch(path, block, why)

    yield get(path).register_forward_pre_hook(begin, with_kwargs=True)
    for site in ("attn_out", "mlp_out"):
        branch = tower.branch(site, layer)
        yield get(branch.path).register_forward_hook(adder(branch.factors))
    yield get(path).register_forward_hook(end)


def rounding_errors(parts: list[Tensor], whole: Tensor) -> float:
    """The largest difference between a sum and the whole, in roundings of the sizes that were added."""
    every, width = (*parts, whole), whole.shape[-1]
    eps = max(torch.finfo(states.dtype).eps for states in every)
    exact = torch.promote_types(whole.dtype, torch.float32)
    few = (states.detach().reshape(-1, width)[:TOKENS] for states in every)
    pre, attention, mlp, post = (states.to(whole.device, exact) for states in few)
    size = (pre.abs() + attention.abs() + mlp.abs()) * eps
    off = (pre + attention + mlp - post).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)
    return float(off.max())
