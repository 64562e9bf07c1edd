"""Find the attention call in a module's ``forward`` by what it is, never by its label.

``transformers`` looks the attention function up in a registry, binds it to a variable and calls it.
nnsight numbers the operations on that variable in execution order, so the label of the call depends
on the bindings and branches before it. We read the source: which variable holds the result of the
registry look-up, which calls go through it, whether they sit in a branch for flash attention, and
whether in a loop (one call per window).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from sinkscope.errors import AttentionCallError

LOOK_UPS = ("get_interface", "ALL_ATTENTION_FUNCTIONS")
LOOPS = (ast.ListComp, ast.GeneratorExp, ast.For, ast.While)


@dataclass(frozen=True)
class AttentionCall:
    """Where a module calls attention.

    Attributes:
        bind: nnsight label of the binding whose value is the attention function.
        call: nnsight label of the call.
        fires: ``"once"`` per forward pass, or ``"per window"`` if the call sits in a loop.
    """

    bind: str
    call: str
    fires: str


@dataclass(frozen=True)
class NoAttentionCall:
    """Stands where a module's attention call was not found: the residual stream can still be probed.

    Attributes:
        reason: The message of the `AttentionCallError` that asking for it raises.
    """

    reason: str


@dataclass(frozen=True)
class _Found:
    """One operation on the attention variable, in source order."""

    line: int
    is_call: bool
    in_loop: bool
    flash: bool | None


def forward_tree(forward: Callable[..., Any]) -> ast.AST | None:
    """The syntax tree of a ``forward``, or None where no source exists."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None


def _looked_up(tree: ast.AST) -> str | None:
    """The variable that holds the attention function."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and any(
                word in ast.unparse(node.value) for word in LOOK_UPS
            ):
                return target.id
    return None


class _Operations(ast.NodeVisitor):
    """Collect bindings and calls of one variable with the branch and loop they are in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[_Found] = []
        self.loops = 0
        self.flash: bool | None = None

    def visit(self, node: ast.AST) -> None:
        """Visit a node, remembering loops and flash branches."""
        if isinstance(node, ast.If) and "flash" in ast.unparse(node.test):
            before = self.flash
            for branch, flash in ((node.body, True), (node.orelse, False)):
                self.flash = flash
                for child in branch:
                    self.visit(child)
            self.flash = before
            return
        in_loop = isinstance(node, LOOPS)
        self.loops += in_loop
        self.generic_visit(node)
        self.loops -= in_loop
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == self.name:
            self._note(node.lineno, is_call=True, in_loop=self.loops > 0)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and any(
            getattr(t, "id", None) == self.name for t in targets
        ):
            self._note(node.lineno, is_call=False, in_loop=False)

    def _note(self, line: int, *, is_call: bool, in_loop: bool) -> None:
        """Remember one operation on the variable."""
        self.found.append(_Found(line, is_call, in_loop, self.flash))


@lru_cache(maxsize=256)
def _read(forward: Callable[..., Any]) -> tuple[str, tuple[_Found, ...]] | None:
    """The attention variable of a ``forward`` and what is done with it, in source order.

    None where no variable holds the attention function. All blocks of a tower share one ``forward``,
    so its source is parsed once.
    """
    tree = forward_tree(forward)
    name = None if tree is None else _looked_up(tree)
    if tree is None or name is None:
        return None
    visitor = _Operations(name)
    visitor.visit(tree)
    return name, tuple(sorted(visitor.found, key=lambda op: op.line))


def _read_class(module: nn.Module) -> tuple[str, tuple[_Found, ...]] | None:
    """What `_read` says of the class's own ``forward``."""
    return _read(inspect.unwrap(type(module).forward))


def calls_attention(module: nn.Module) -> bool:
    """Whether the class's own ``forward`` looks an attention function up and calls it."""
    return _read_class(module) is not None


def kernel_of(config: Any) -> str:
    """The attention implementation that a config asks for, such as ``"sdpa"``."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def look_for_attention_call(module: nn.Module, path: str) -> AttentionCall | NoAttentionCall:
    """The attention call of a module, or the reason why there is none that can be read."""
    try:
        return find_attention_call(module, path)
    except AttentionCallError as error:
        return NoAttentionCall(str(error))


def find_attention_call(module: nn.Module, path: str) -> AttentionCall:
    """The attention call of an attention module under its present kernel.

    Args:
        module: The attention module.
        path: Its dotted path, for the message.

    Returns:
        The labels and how often the call fires.

    Raises:
        AttentionCallError: If the source shows no call, or several for the present kernel.
    """
    read = _read_class(module)
    if read is None:
        raise AttentionCallError(
            f"{path} ({type(module).__name__}) does not call attention through transformers' "
            "attention interface; expected a forward that looks its function up in "
            "ALL_ATTENTION_FUNCTIONS. Probes of the residual stream still work on this model."
        )
    name, ordered = read
    kernel = kernel_of(getattr(module, "config", None))
    wants_flash = "flash" in kernel
    binds = [i for i, op in enumerate(ordered) if not op.is_call]
    calls = [i for i, op in enumerate(ordered) if op.is_call and op.flash in (None, wants_flash)]
    if len(calls) != 1 or not binds or binds[-1] > calls[0]:
        raise AttentionCallError(
            f"{path} ({type(module).__name__}) has {len(calls)} attention calls for kernel "
            f"{kernel!r}; expected exactly one after its binding. Probes of the residual "
            "stream still work on this model. Please report this class."
        )
    return AttentionCall(
        bind=f"{name}_{binds[-1]}",
        call=f"{name}_{calls[0]}",
        fires="per window" if ordered[calls[0]].in_loop else "once",
    )
