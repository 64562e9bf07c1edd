"""What a block adds to the residual stream: attention and MLP with their factors. The source of ``forward``
is followed with sums of terms in the place of tensors, without modules that change nothing in evaluation."""

import ast
import copy
import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinkscope.anatomy.attention_call import forward_tree

STREAM = "the stream"
DROPOUT = ("functional.dropout", "F.dropout")
COMPARISONS = {ast.Is: operator.is_, ast.IsNot: operator.is_not}
COMPARISONS |= {ast.Eq: operator.eq, ast.NotEq: operator.ne}


@dataclass(frozen=True)
class Branch:
    """How attention or the MLP of a block reaches the residual stream: it adds the output of the module at
    ``path``, times ``factors``, paths of numbers or parameters. ``through`` are the paths of all modules and
    factors from the branch's own module to the stream, in order; ``norm`` is whether one of them is a norm.
    """

    path: str
    factors: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    norm: bool = False


@dataclass(frozen=True)
class NoBranch:
    """Stands where what a block adds to the stream could not be read, with the message of the error."""

    reason: str


def read_branches(
    path: str, block: nn.Module, attention: nn.Module, mlp: nn.Module, width: int
) -> tuple[Branch, Branch] | NoBranch:
    """Read how attention and the MLP of a block at a path reach the residual stream of a width."""
    flow = _Flow(block, {"attention": attention, "mlp": mlp}, width)
    terms = flow.result()
    steps = {term.source: term.steps for term in terms}
    if sorted(term.source for term in terms) != ["attention", "mlp", STREAM] or steps[STREAM]:
        found = " + ".join(" * ".join((term.source, *term.steps)) for term in terms)
        return no_branch(path, block, f"its forward returns {found or 'what cannot be read'}")
    if twice := [step for term in terms for step in term.steps if flow.calls.get(step, 0) > 1]:
        return no_branch(path, block, f"its {twice[0]} is called more than once")
    first = _branch(path, block, attention, steps["attention"])
    return first, _branch(path, block, mlp, steps["mlp"])


def _branch(path: str, block: nn.Module, own: nn.Module, steps: tuple[str, ...]) -> Branch:
    """A branch from the names of what it passes behind its own module."""
    modules = dict(block.named_modules())
    passed = [name for name in steps if name in modules]
    last = steps.index(passed[-1]) + 1 if passed else 0
    end = passed[-1] if passed else next(name for name, m in modules.items() if m is own)
    through = tuple(f"{path}.{step}" for step in steps)
    norm = any("norm" in type(modules[name]).__name__.lower() for name in passed)
    return Branch(f"{path}.{end}", through[last:], through, norm)


def no_branch(path: str, block: nn.Module, why: str) -> NoBranch:
    """Why a block has no sites, in the words of an error."""
    return NoBranch(
        f"{path} ({type(block).__name__}) has no sites attn_out and mlp_out: {why}; expected "
        "resid_post = resid_pre + attn_out + mlp_out. Write site='resid_pre' or 'resid_post', which "
        "work on this model, and report this class."
    )


@dataclass(frozen=True)
class _Term:
    """A summand: `STREAM`, a branch or other source, and the modules and factors it has passed."""

    source: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Known:
    """An attribute of the block, or a constant."""

    value: Any


_Value = tuple[_Term, ...] | _Known
_Names = dict[str, _Value]


def _other(node: ast.AST) -> tuple[_Term, ...]:
    """Something else, in the words of the source."""
    words = ast.unparse(node)
    return (_Term(words if len(words) <= 60 else f"{words[:57]}..."),)


def _changes_nothing(module: nn.Module, width: int) -> bool:
    """Whether a module without parameters returns its input when it is evaluated."""
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


class _Flow:
    """What a block's ``forward`` makes of the stream and of the modules in which branches start."""

    def __init__(self, block: nn.Module, branches: dict[str, nn.Module], width: int) -> None:
        self.block, self.width = block, width
        self.branches = {id(module): name for name, module in branches.items()}
        self.names = {id(module): name for name, module in block.named_modules() if name}
        self.calls: dict[str, int] = {}
        self.returned: list[_Value] = []

    def result(self) -> tuple[_Term, ...]:
        """The terms that ``forward`` returns; empty if its source cannot be read."""
        tree = forward_tree(inspect.unwrap(type(self.block).forward))
        function = tree.body[0] if isinstance(tree, ast.Module) else None
        if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
            return ()
        own, stream = (arg.arg for arg in function.args.args[:2])
        self.follow(function.body, {own: _Known(self.block), stream: (_Term(STREAM),)})
        made = self.returned[0] if self.returned else ()
        if any(again != made for again in self.returned):
            return (_Term("one of several results"),)
        return made if isinstance(made, tuple) else ()

    def follow(self, body: list[ast.stmt], names: _Names) -> bool:
        """Follow statements, which change the names; whether they return."""
        for node in body:
            match node:
                case ast.Return(value=value):
                    self.returned.append(() if value is None else self.value(value, names))
                    return True
                case ast.If():
                    if self.follow_if(node, names):
                        return True
                case ast.Assign(targets=targets, value=value):
                    made = self.value(value, names)
                    for target in targets:
                        self.assign(target, made, names)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self.assign(target, self.value(value, names), names)
                case ast.AugAssign(target=target, op=op, value=value):
                    left = ast.parse(ast.unparse(target), mode="eval").body
                    self.assign(target, self.value(ast.BinOp(left, op, value), names), names)
                case ast.Expr(value=value):
                    self.value(value, names)
                case _:
                    for inner in ast.walk(node):
                        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                            names[inner.id] = _other(inner)
        return False

    def follow_if(self, node: ast.If, names: _Names) -> bool:
        """Follow the side that the block's attributes choose, or both; whether they return."""
        chosen = self.truth(node.test, names)
        if chosen is not None:
            return self.follow(node.body if chosen else node.orelse, names)
        sides = [(dict(names), body) for body in (node.body, node.orelse)]
        going = [side for side, body in sides if not self.follow(body, side)]
        unsure = (_Term(f"(what depends on {ast.unparse(node.test)})"),)
        for name in {name for side in going for name in side}:
            first = going[0].get(name, ())
            names[name] = first if all(side.get(name) == first for side in going) else unsure
        return not going

    def assign(self, target: ast.expr, value: _Value, names: _Names) -> None:
        """Bind a target: of several the first is the states; a part of a tensor spoils the whole."""
        match target:
            case ast.Name(id=name):
                names[name] = value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for i, part in enumerate(parts):
                    self.assign(part, value if i == 0 else _other(part), names)
            case ast.Subscript(value=whole):
                self.assign(whole, _other(target), names)

    def truth(self, test: ast.expr, names: _Names) -> bool | None:
        """A condition on the block's attributes, or None if it is about anything else."""
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.truth(operand, names)
                return None if inner is None else not inner
            case ast.BoolOp(op=op, values=values):
                decides, sides = isinstance(op, ast.Or), [self.truth(one, names) for one in values]
                undecided = None if None in sides else not decides
                return decides if decides in sides else undecided
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                one, other = self.value(left, names), self.value(right, names)
                compare = COMPARISONS.get(type(op))
                if compare and isinstance(one, _Known) and isinstance(other, _Known):
                    return bool(compare(one.value, other.value))
                return None
        made = self.value(test, names)
        if isinstance(made, _Known) and isinstance(made.value, (bool, int, str, type(None))):
            return bool(made.value)
        return None

    def value(self, node: ast.expr, names: _Names) -> _Value:
        """What an expression stands for; a tuple for its first part."""
        match node:
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Constant(value=value):
                return _Known(value)
            case ast.Call():
                return self.call(node, names)
            case ast.BinOp():
                return self.operation(node, names)
            case ast.Attribute(value=owner, attr=name):
                base = self.value(owner, names)
                if isinstance(base, _Known) and hasattr(base.value, name):
                    return _Known(getattr(base.value, name))
            case ast.Tuple(elts=[first, *_]) | ast.Subscript(value=first, slice=ast.Constant(0)):
                return self.value(first, names)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                if (chosen := self.truth(test, names)) is not None:
                    return self.value(body if chosen else orelse, names)
        return _other(node)

    def operation(self, node: ast.BinOp, names: _Names) -> _Value:
        """Sums, and products with a number or a parameter of the block."""
        left, right = self.value(node.left, names), self.value(node.right, names)
        if isinstance(node.op, ast.Add) and isinstance(left, tuple) and isinstance(right, tuple):
            return left if isinstance(node.right, ast.Tuple) else left + right
        states, factor, name = left, right, ast.unparse(node.right)
        if isinstance(left, _Known):
            states, factor, name = right, left, ast.unparse(node.left)
        own = isinstance(factor, _Known) and isinstance(factor.value, (int, float, torch.Tensor))
        if isinstance(node.op, ast.Mult) and isinstance(states, tuple) and own:
            owner, _, step = name.partition(".")
            if isinstance(names.get(owner), _Known) and step:
                return tuple(_Term(term.source, (*term.steps, step)) for term in states)
        return _other(node)

    def call(self, node: ast.Call, names: _Names) -> _Value:
        """A module of the block on states, or dropout; anything else is unknown."""
        values = [self.value(one, names) for one in (*node.args, *(k.value for k in node.keywords))]
        if ast.unparse(node.func).endswith(DROPOUT) and values:
            return values[0]
        function = self.value(node.func, names)
        module = function.value if isinstance(function, _Known) else None
        if not isinstance(module, nn.Module) or id(module) not in self.names:
            return _other(node)
        name = self.names[id(module)]
        self.calls[name] = self.calls.get(name, 0) + 1
        if id(module) in self.branches:
            return (_Term(self.branches[id(module)]),)
        states = values[0] if values else _other(node)
        if _changes_nothing(module, self.width):
            return states
        term = states[0] if isinstance(states, tuple) and len(states) == 1 else None
        if term and term.source in self.branches.values():
            return (_Term(term.source, (*term.steps, name)),)
        return _other(node)
