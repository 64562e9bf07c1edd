"""What a block adds to the residual stream: its two branches, attention and MLP.

::

    stream ------------------------------------------(+)---> stream
       `---> norm ---> attention ---> LayerScale ---> x 0.22 --'

What a branch passes behind its own module (a LayerScale, a norm, a factor that is a parameter or a
number) is read in the source of the block. Modules that change nothing when the model is evaluated,
such as dropout and DropPath, are left out.
"""

from __future__ import annotations

import ast
import copy
import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sinkscope.anatomy.attention_call import forward_tree

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


STREAM = "the stream"

DROPOUT = ("functional.dropout", "F.dropout")

TREES: WeakKeyDictionary[type, ast.AST | None] = WeakKeyDictionary()

"""The ``forward`` of classes that were read: all blocks of a tower are of one or two."""


@dataclass(frozen=True)
class Term:
    """One summand.

    Attributes:
        source: `STREAM`, the name of a branch, or the source of something else.
        steps: Modules and factors that it has passed, as dotted names inside the block.
    """

    source: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Known:
    """An attribute of the block, or a constant."""

    value: Any


Sum = tuple[Term, ...]

Value = Sum | Known

Names = dict[str, Value]


def other(node: ast.AST) -> Sum:
    """Something that is neither the stream nor a branch, in the words of the source."""
    words = ast.unparse(node)
    return (Term(words if len(words) <= 60 else f"{words[:57]}..."),)


def changes_nothing(module: nn.Module, width: int) -> bool:
    """Whether a module without parameters returns what it is given when the model is evaluated.

    Args:
        module: The module, such as a dropout.
        width: Width of the residual stream.
    """
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    forward: Any = type(module).forward
    given = list(inspect.signature(forward).parameters.values())[1:]
    if sum(one.default is one.empty and "VAR" not in one.kind.name for one in given) != 1:
        return False
    states = torch.linspace(-2, 2, 2 * width, device="cpu").reshape(1, 2, width)
    with torch.no_grad():
        out = forward(copy.deepcopy(module).eval(), states)
    return torch.is_tensor(out) and torch.equal(out, states)


class Flow:
    """What a block's ``forward`` makes of the stream and of its branches.

    Args:
        block: The block.
        branches: Name -> the module in which the branch starts.
        width: Width of the residual stream.
    """

    def __init__(self, block: nn.Module, branches: dict[str, nn.Module], width: int) -> None:
        self.block, self.width = block, width
        self.branches = {id(module): name for name, module in branches.items()}
        self.names = {id(module): name for name, module in block.named_modules() if name}
        self.calls: dict[str, int] = {}
        self.returned: list[Value] = []

    def result(self) -> Sum:
        """The terms that ``forward`` returns; empty if its source cannot be read."""
        kind = type(self.block)
        if kind not in TREES:
            TREES[kind] = forward_tree(inspect.unwrap(type(self.block).forward))
        tree = TREES[kind]
        function = tree.body[0] if isinstance(tree, ast.Module) else None
        if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
            return ()
        own, stream = (arg.arg for arg in function.args.args[:2])
        self.follow(function.body, {own: Known(self.block), stream: (Term(STREAM),)})
        made = self.returned[0] if self.returned else ()
        if any(again != made for again in self.returned):
            return (Term("one of several results"),)
        return made if isinstance(made, tuple) else ()

    def follow(self, body: list[ast.stmt], names: Names) -> bool:
        """Follow statements, which change the names; whether they return."""
        for node in body:
            if isinstance(node, ast.Return):
                self.returned.append(() if node.value is None else self.value(node.value, names))
                return True
            if isinstance(node, ast.If):
                if self.follow_if(node, names):
                    return True
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                made = self.value(node.value, names)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, made, names)
            elif isinstance(node, ast.AugAssign):
                left = ast.parse(ast.unparse(node.target), mode="eval").body
                self.assign(
                    node.target, self.value(ast.BinOp(left, node.op, node.value), names), names
                )
            elif isinstance(node, ast.Expr):
                self.value(node.value, names)
            else:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                        names[inner.id] = other(inner)
        return False

    def follow_if(self, node: ast.If, names: Names) -> bool:
        """Follow the side that the block's attributes choose, or both; whether they return."""
        chosen = self.truth(node.test, names)
        if chosen is not None:
            return self.follow(node.body if chosen else node.orelse, names)
        going = []
        for body in (node.body, node.orelse):
            side = dict(names)
            if not self.follow(body, side):
                going.append(side)
        for name in {name for side in going for name in side}:
            first = going[0].get(name, ())
            same = all(side.get(name) == first for side in going)
            unsure = (Term(f"(what depends on {ast.unparse(node.test)})"),)
            names[name] = first if same else unsure
        return not going

    def assign(self, target: ast.expr, value: Value, names: Names) -> None:
        """Bind a target: of several the first is the states; a part of a tensor spoils the whole."""
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for i, part in enumerate(target.elts):
                self.assign(part, value if i == 0 else other(part), names)
        elif isinstance(target, ast.Subscript):
            self.assign(target.value, other(target), names)

    def truth(self, test: ast.expr, names: Names) -> bool | None:
        """A condition on the block's attributes, or None if it is about anything else."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand, names)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            sides = [self.truth(side, names) for side in test.values]
            decides = isinstance(test.op, ast.Or)
            if decides in sides:
                return decides
            return None if None in sides else not decides
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            return self.comparison(test, names)
        made = self.value(test, names)
        simple = (bool, int, str, type(None))
        known = isinstance(made, Known) and isinstance(made.value, simple)
        return bool(made.value) if known and isinstance(made, Known) else None

    def comparison(self, test: ast.Compare, names: Names) -> bool | None:
        """``is`` and ``==`` between attributes and constants."""
        left, right = self.value(test.left, names), self.value(test.comparators[0], names)
        if not (isinstance(left, Known) and isinstance(right, Known)):
            return None
        kind = test.ops[0]
        if isinstance(kind, (ast.Is, ast.IsNot)):
            return (left.value is right.value) == isinstance(kind, ast.Is)
        if isinstance(kind, (ast.Eq, ast.NotEq)):
            return bool(left.value == right.value) == isinstance(kind, ast.Eq)
        return None

    def value(self, node: ast.expr, names: Names) -> Value:
        """What an expression stands for; a tuple for its first part."""
        if isinstance(node, ast.Name):
            return names.get(node.id, other(node))
        if isinstance(node, ast.Constant):
            return Known(node.value)
        if isinstance(node, ast.Call):
            return self.call(node, names)
        if isinstance(node, ast.BinOp):
            return self.operation(node, names)
        if isinstance(node, ast.Attribute):
            base = self.value(node.value, names)
            if isinstance(base, Known) and hasattr(base.value, node.attr):
                return Known(getattr(base.value, node.attr))
        elif isinstance(node, ast.Tuple) and node.elts:
            return self.value(node.elts[0], names)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "0":
            return self.value(node.value, names)
        elif isinstance(node, ast.IfExp):
            chosen = self.truth(node.test, names)
            if chosen is not None:
                return self.value(node.body if chosen else node.orelse, names)
        return other(node)

    def operation(self, node: ast.BinOp, names: Names) -> Value:
        """Sums, and products with a number or a parameter of the block."""
        left, right = self.value(node.left, names), self.value(node.right, names)
        if isinstance(node.op, ast.Add) and isinstance(left, tuple) and isinstance(right, tuple):
            return left if isinstance(node.right, ast.Tuple) else left + right
        states, factor, name = left, right, ast.unparse(node.right)
        if isinstance(left, Known):
            states, factor, name = right, left, ast.unparse(node.left)
        own = isinstance(factor, Known) and isinstance(factor.value, (int, float, torch.Tensor))
        if isinstance(node.op, ast.Mult) and isinstance(states, tuple) and own:
            owner, _, step = name.partition(".")
            if isinstance(names.get(owner), Known) and step:
                return tuple(Term(term.source, (*term.steps, step)) for term in states)
        return other(node)

    def call(self, node: ast.Call, names: Names) -> Value:
        """A module of the block on states, or dropout; anything else is unknown."""
        values = [self.value(one, names) for one in (*node.args, *(k.value for k in node.keywords))]
        if ast.unparse(node.func).endswith(DROPOUT) and values:
            return values[0]
        function = self.value(node.func, names)
        module = function.value if isinstance(function, Known) else None
        if not isinstance(module, nn.Module) or id(module) not in self.names:
            return other(node)
        name = self.names[id(module)]
        self.calls[name] = self.calls.get(name, 0) + 1
        if id(module) in self.branches:
            return (Term(self.branches[id(module)]),)
        states = values[0] if values else other(node)
        if changes_nothing(module, self.width):
            return states
        branch = isinstance(states, tuple) and len(states) == 1 and states[0].source
        if isinstance(states, tuple) and branch in self.branches.values():
            return (Term(states[0].source, (*states[0].steps, name)),)
        return other(node)
