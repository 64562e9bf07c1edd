"""What a block adds to the residual stream: its two branches, attention and MLP.

::

    stream ------------------------------------------(+)---> stream
       `---> norm ---> attention ---> LayerScale ---> x 0.22 --'

What a branch passes behind its own module (a LayerScale, a norm, a factor that is a parameter or a
number) is read in the source of the block. Modules that change nothing when the model is evaluated,
such as dropout and DropPath, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sinkscope.models.flow import STREAM, Flow

BRANCHES = ("attention", "mlp")


@dataclass(frozen=True)
class Branch:
    """How attention or the MLP of a block reaches the residual stream.

    Attributes:
        path: Dotted path of the module whose output the block adds, times the factors.
        factors: Dotted paths of the numbers or parameters that multiply that output.
        through: Dotted paths of all modules and factors between the branch's own module and the
            stream, in order.
        norm: Whether one of them is a norm, which divides what a token gets by its size.
    """

    path: str
    factors: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    norm: bool = False


@dataclass(frozen=True)
class NoBranch:
    """Stands where what a block adds to the stream could not be read.

    Attributes:
        reason: The message of the `ModelError` that asking for it raises.
    """

    reason: str


def read_branches(
    path: str, block: nn.Module, attention: nn.Module, mlp: nn.Module, width: int
) -> tuple[Branch, Branch] | tuple[NoBranch, NoBranch]:
    """How attention and the MLP of a block reach the residual stream.

    Args:
        path: The block's dotted path.
        block: The block.
        attention: Its attention module.
        mlp: Its MLP.
        width: Width of the residual stream.

    Returns:
        The branch of attention and that of the MLP, or why they cannot be read.
    """
    flow = Flow(block, {"attention": attention, "mlp": mlp}, width)
    terms = flow.result()
    steps = {term.source: term.steps for term in terms}
    twice = [step for term in terms for step in term.steps if flow.calls.get(step, 0) > 1]
    why = ""
    if sorted(term.source for term in terms) != sorted((STREAM, *BRANCHES)) or steps[STREAM]:
        found = " + ".join(" * ".join((term.source, *term.steps)) for term in terms)
        why = f"its forward returns {found or 'what cannot be read'}"
    elif twice:
        why = f"its {twice[0]} is called more than once"
    if why:
        missing = no_branch(path, block, why)
        return missing, missing
    modules = dict(block.named_modules())
    first, second = (
        branch_of(path, flow.names[id(own)], steps[name], modules)
        for name, own in zip(BRANCHES, (attention, mlp), strict=True)
    )
    return first, second


def branch_of(path: str, own: str, steps: tuple[str, ...], modules: dict[str, nn.Module]) -> Branch:
    """A branch from the names of what it passes, all relative to the block."""
    passed = [i for i, step in enumerate(steps) if step in modules]
    through = tuple(f"{path}.{step}" for step in steps)
    last = passed[-1] if passed else -1
    return Branch(
        path=through[last] if passed else f"{path}.{own}",
        factors=through[last + 1 :],
        through=through,
        norm=any("norm" in type(modules[steps[i]]).__name__.lower() for i in passed),
    )


def no_branch(path: str, block: nn.Module, why: str) -> NoBranch:
    """The reason why there are no sites, in the words of an error."""
    return NoBranch(
        f"{path} ({type(block).__name__}) has no sites attn_out and mlp_out: {why}; expected "
        "resid_post = resid_pre + attn_out + mlp_out. Write site='resid_pre' or 'resid_post', which "
        "work on this model, and report this class."
    )
