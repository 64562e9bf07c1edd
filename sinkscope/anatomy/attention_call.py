"""Find the attention call in a module's ``forward`` by what it is: ``transformers`` looks the function up,
binds it to a variable and calls it, and nnsight numbers the operations on that variable in source order."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
LOOK_UPS = ("get_interface", REGISTRY)
LOOPS = (ast.ListComp, ast.GeneratorExp, ast.For, ast.While)


@dataclass(frozen=True)
class AttentionCall:
    """Where a module calls attention: nnsight's labels of the binding of the function, and of the call, which
    ``fires`` ``"once"`` per forward pass, or ``"per window"`` in a loop."""

    bind: str
    call: str
    fires: str


@dataclass(frozen=True)
class NoAttentionCall:
    """Stands where a module's attention call was not found, with the message of the error."""

    reason: str


@dataclass(frozen=True)
class _Operation:
    """One binding or call of the attention variable."""

    line: int
    is_call: bool
    in_loop: bool
    flash: bool | None


@lru_cache(maxsize=256)
def forward_tree(forward: Callable[..., Any]) -> ast.AST | None:
    """The syntax tree of a ``forward``, or None where no source exists; all blocks share one."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None


def source_of(forward: Callable[..., Any]) -> str:
    """The source of a ``forward``, "" where there is none."""
    tree = forward_tree(inspect.unwrap(forward))
    return "" if tree is None else ast.unparse(tree)


def _targets(node: ast.AST) -> list[ast.expr]:
    """What an assignment binds; nothing if it is none."""
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _operations(
    node: ast.AST, name: str, in_loop: bool = False, flash: bool | None = None
) -> Iterator[_Operation]:
    """Bindings and calls of one variable, with the loop and the flash branch they are in."""
    if isinstance(node, ast.If) and "flash" in ast.unparse(node.test):
        for branch, is_flash in ((node.body, True), (node.orelse, False)):
            for child in branch:
                yield from _operations(child, name, in_loop, is_flash)
        return
    for child in ast.iter_child_nodes(node):
        yield from _operations(child, name, in_loop or isinstance(node, LOOPS), flash)
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
        yield _Operation(node.lineno, True, in_loop, flash)
    if any(getattr(target, "id", None) == name for target in _targets(node)):
        yield _Operation(getattr(node, "lineno", 0), False, False, flash)


@lru_cache(maxsize=256)
def _read(forward: Callable[..., Any]) -> tuple[str, list[_Operation]] | None:
    """The variable of a ``forward`` that holds attention and its operations in source order, or None."""
    tree = forward_tree(forward) or ast.Pass()
    for node in ast.walk(tree):
        if (targets := _targets(node)) and isinstance(targets[0], ast.Name):
            source, name = ast.unparse(getattr(node, "value", None) or ast.Pass()), targets[0].id
            if any(word in source for word in LOOK_UPS):
                return name, sorted(_operations(tree, name), key=lambda one: one.line)
    return None


def calls_attention(module: nn.Module) -> bool:
    """Whether the class's own ``forward`` looks an attention function up and calls it."""
    return _read(inspect.unwrap(type(module).forward)) is not None


def globals_of(module: nn.Module) -> dict[str, Any]:
    """The names of the file that a module's ``forward`` is written in."""
    return _written_in(type(module).forward)


@lru_cache(maxsize=256)
def _written_in(forward: Callable[..., Any]) -> dict[str, Any]:
    return inspect.unwrap(forward).__globals__


def registry_of(module: nn.Module) -> Any:
    """The registry in which a module's ``forward`` looks its attention function up, or None."""
    return globals_of(module).get(REGISTRY)


def looks_up(module: nn.Module) -> bool:
    """Whether a module asks its file's registry for its function; some do not under eager attention."""
    asks = _asks(type(module).forward) or kernel_of(getattr(module, "config", None)) != "eager"
    return asks and registry_of(module) is not None


@lru_cache(maxsize=256)
def _asks(forward: Callable[..., Any]) -> bool:
    return "get_interface" in source_of(forward)


def kernel_of(config: Any) -> str:
    """The attention implementation that a config asks for, such as ``"sdpa"``."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def read_attention_call(module: nn.Module, path: str) -> AttentionCall | NoAttentionCall:
    """Read the attention call of a module under its present kernel, or why there is not one."""
    what, works = f"{path} ({type(module).__name__})", "Probes of states still work on this model."
    if (read := _read(inspect.unwrap(type(module).forward))) is None:
        return NoAttentionCall(
            f"{what} does not call attention through transformers' attention interface; expected a "
            f"forward that looks its function up in ALL_ATTENTION_FUNCTIONS. {works}"
        )
    name, operations = read
    kernel = kernel_of(getattr(module, "config", None))
    seen = (None, "flash" in kernel)
    binds = [i for i, one in enumerate(operations) if not one.is_call]
    calls = [i for i, one in enumerate(operations) if one.is_call and one.flash in seen]
    if len(calls) != 1 or not binds or binds[-1] > calls[0]:
        return NoAttentionCall(
            f"{what} has {len(calls)} attention calls for kernel {kernel!r}; expected exactly one after "
            f"its binding. {works} Please report this class."
        )
    fires = "per window" if operations[calls[0]].in_loop else "once"
    return AttentionCall(f"{name}_{binds[-1]}", f"{name}_{calls[0]}", fires)
