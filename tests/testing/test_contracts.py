"""Interventions that break one promise each, and the message that `check_intervention` has for it."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import sinkscope as ss
from sinkscope.interventions import Edit
from sinkscope.interventions.base import at_layer, runs_now, selected
from sinkscope.kernels.edits import edit_keys
from sinkscope.kernels.residual import state_effect
from sinkscope.testing import ContractError, check_intervention, random_image

IN_PLACE = "never writes in place"
KEEPS = "keeps what earlier edits of its site did"


@pytest.fixture(scope="module")
def ready(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(48, 40, 0), text="how many red shapes")
    some = torch.zeros_like(sample.tokens.live)
    some[0, (sample.tokens.image[0] >= 0).nonzero().flatten()[:3]] = True
    return lvlm, sample, some


def in_place(states, state, mask):
    states[mask] = 0.0
    return states, state_effect(mask)


def in_place_beside(states, state, mask):
    """A new tensor is returned, and the old one is spoilt all the same."""
    new = torch.where(mask[..., None], 0.5 * states, states)
    states[mask] = 0.0
    return new, state_effect(mask)


def in_parameters(states, state, mask):
    new = torch.where(mask[..., None], 0.5 * states, states)
    mask[:, 0] = True
    return new, state_effect(mask)


def everywhere(states, state, mask):
    return states * 1.5, state_effect(mask)


def everywhere_told(states, state, mask):
    return states * 1.5, state_effect(torch.ones_like(mask))


def wrong_token(states, state, mask):
    return torch.where(mask.roll(1, 1)[..., None], 0.5 * states, states), state_effect(mask)


def good(states, state, mask):
    return torch.where(mask[..., None], 0.5 * states, states), state_effect(mask)


@dataclass(frozen=True, eq=False)
class OfStates:
    """An edit of what attention writes, with a kernel of choice."""

    tokens: Any
    kernel: Any
    site: str = "attn_out"
    steps: str = "all"
    allow_noop: bool = False
    tower: str = "language"

    def edits(self, context):
        mask = selected(context, self.tower, self.tokens, "OfStates", self.allow_noop)
        if context.step:
            return []
        return [
            Edit(
                ss.Site(self.tower, self.site, layer), self.kernel, {"mask": at_layer(mask, layer)}
            )
            for layer in context.layers(self.tower, None)
        ]


@dataclass(frozen=True, eq=False)
class PrefillOnly:
    """Says that it edits every step."""

    tokens: Any
    steps: str = "all"
    allow_noop: bool = False
    tower: str = "language"

    def edits(self, context):
        return [] if context.step else ss.MaskKeys(self.tokens).edits(context)


@dataclass(frozen=True, eq=False)
class OfAttention:
    """A mask whose ``heads`` and ``queries`` are names only, with a kernel of choice."""

    tokens: Any
    kernel: Any = edit_keys
    heads: Any = None
    queries: Any = None
    steps: str = "all"
    allow_noop: bool = False
    tower: str = "language"

    def edits(self, context):
        if not runs_now(self.steps, context, self.tower):
            return []
        edits = ss.MaskKeys(self.tokens).edits(context)
        return [replace(edit, kernel=self.kernel) for edit in edits]


def forgets(call, state, span, **parameters):
    """Edits the model's own function, whatever was edited before."""
    plain = (getattr(call[0], "plain", call[0]), *call[1:])
    return edit_keys(plain, state, span, **parameters)


def starts_again(call, state, span, **parameters):
    """Likewise, by another name of the same function."""
    plain = (getattr(call[0], "base", call[0]), *call[1:])
    return edit_keys(plain, state, span, **parameters)


def writes_when_asked(call, state, span, **parameters):
    """The kernel itself changes nothing, but the function it makes does."""
    after, effect = edit_keys(call, state, span, **parameters)

    def function(module, query, key, value, *args, **kwargs):
        value[:, :, 0] *= 2
        return after[0](module, query, key, value, *args, **kwargs)

    return (function, *after[1:]), effect


BROKEN = {
    "in place": (lambda some: OfStates(some, in_place), IN_PLACE),
    "in place, beside a new tensor": (lambda some: OfStates(some, in_place_beside), IN_PLACE),
    "in place, in its parameters": (lambda some: OfStates(some.clone(), in_parameters), IN_PLACE),
    "in place, in attention": (lambda some: OfAttention(some, writes_when_asked), IN_PLACE),
    "all tokens": (lambda some: OfStates(some, everywhere), "tokens and queries that were not"),
    "all tokens, as it says": (
        lambda some: OfStates(some, everywhere_told),
        "tokens and queries that were not",
    ),
    "another token": (lambda some: OfStates(some, wrong_token), "tokens and queries that were not"),
    "heads in name only": (lambda some: OfAttention(some, heads=(1,)), "heads that were not"),
    "queries in name only": (
        lambda some: OfAttention(some, queries="last", steps="prefill"),
        "tokens and queries that were not",
    ),
    "prefill only": (lambda some: PrefillOnly(some), "with the cache is what one pass"),
    "forgets earlier edits": (lambda some: OfAttention(some, forgets), KEEPS),
    "starts again": (lambda some: OfAttention(some, starts_again), KEEPS),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(ready, name):
    lvlm, sample, some = ready
    make, message = BROKEN[name]
    plain = lvlm.run(sample).logits
    with pytest.raises(ContractError, match=message):
        check_intervention(lambda: make(some), lvlm, sample, remote=False)
    assert torch.equal(lvlm.run(sample).logits, plain)


def test_in_place_is_found_before_the_remote_path_runs(ready):
    lvlm, sample, some = ready
    with pytest.raises(ContractError, match=IN_PLACE):
        check_intervention(lambda: OfStates(some, in_place), lvlm, sample, remote=True)


@dataclass(frozen=True, eq=False)
class Tells:
    """Tokens are not named, so that only what the kernel tells can be compared."""

    inner: Any
    steps: str = "all"
    allow_noop: bool = False
    tower: str = "language"

    def edits(self, context):
        return self.inner.edits(context)


def test_more_tokens_than_a_kernel_tells_are_found(ready):
    lvlm, sample, some = ready
    with pytest.raises(ContractError, match="no more rows or tokens change"):
        check_intervention(lambda: Tells(OfStates(some, everywhere)), lvlm, sample, remote=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda some: OfStates(some, good),
        lambda some: Tells(OfStates(some, good)),
        lambda some: OfAttention(some),
        lambda some: ss.interventions.SinkToFront(some.roll(1, 1) & (some | some.roll(-1, 1))),
        lambda some: ss.AblateValues("all"),
        lambda some: ss.AblateValues("all", torch.ones(1, 1, 1, 1)),
        lambda some: ss.ScaleKeys("all", 0.0),
        lambda some: ss.interventions.EvictKeys(start=0, recent=1),
        lambda some: ss.Redistribute(some, "text", 0.5),
        lambda some: ss.AttentionKnockout("last", some),
    ],
)
def test_a_kept_promise_passes(ready, make):
    lvlm, sample, some = ready
    check_intervention(lambda: make(some), lvlm, sample, remote=False)
