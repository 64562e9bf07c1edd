"""The base of probes that ask one site of every layer one question."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from sinkscope.anatomy.context import Context, indices_of
from sinkscope.checks import check_choice
from sinkscope.errors import ProbeError
from sinkscope.protocols import Read
from sinkscope.results import Record, axes_of, mask_padding, stack_layers
from sinkscope.sites import STATE_SITES, Site, Tower
from sinkscope.tokens import Selection


class ByLayer(tuple[Tensor, ...]):
    """A parameter of a kernel with a value for every block, or one for all."""

    def at(self, layer: int) -> Tensor:
        """The value of one block."""
        return self[layer if len(self) > 1 else 0]


class LayerProbe(Record):
    """A probe with one kernel at one site of every layer.

    A subclass is a frozen dataclass with the fields ``layers``, block indices or None for all; ``tower``;
    and ``site``, one of ``at_sites`` (or ``sites``, several). Its kernel gives a tensor ``[batch ...]``, or
    a dict of tensors by the names of the result's fields. Of the result, fields ``[batch layer ...]`` are
    stacked over layers and NaN at padding, an int field ``[batch query]`` (or pos, row) holds positions, and
    the others are fields of the probe.

    Keywords of the class, as in ``class TokenNorms(LayerProbe, kernel=norms, result=NormResult)``:
    ``kernel``, a pure function; ``result``, the class of the result; ``needs``, what a tower must have;
    ``over``, the field that selects which queries the result has, empty for all of them; ``per_key``,
    whether it has a value per key, at decode steps per key of the cache.
    """

    needs: ClassVar[str] = "states"
    kernel: ClassVar[Any]
    result: ClassVar[type[Any]]
    over: ClassVar[str] = ""
    per_key: ClassVar[bool] = False
    at_sites: ClassVar[tuple[str, ...]] = STATE_SITES
    layers: Any
    tower: Tower
    site: str

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__()
        if unknown := set(given) - {"kernel", "result", "needs", "over", "per_key"}:
            raise TypeError(f"Got {unknown} for {cls.__name__}; see LayerProbe for what it takes.")
        for name, value in given.items():
            setattr(cls, name, staticmethod(value) if name == "kernel" else value)

    def reads(self, context: Context) -> list[Read]:
        """One read per layer and site."""
        sites, layout, reads = getattr(self, "sites", (self.site,)), context.layout(self.tower), []
        if isinstance(sites, str) or not isinstance(sites, Sequence) or not sites:
            raise ProbeError(f"Got sites={sites!r:.60}; expected a list of {list(self.at_sites)}.")
        for site in sites:
            check_choice(self.at_sites, site=site, error=ProbeError)
        parameters = self._parameters(context) | ({} if layout is None else {"layout": layout})
        differ = {name: x for name, x in parameters.items() if isinstance(x, ByLayer)}
        for layer in self._layers(context):
            own = parameters | {name: x.at(layer) for name, x in differ.items()}
            reads += [Read(Site(self.tower, site, layer), self.kernel, own) for site in sites]
        return reads

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        """Stack the layers and mask the padding."""
        answers = {site: answer for site, answer in answers.items() if site.name == self.site}
        axes, made = axes_of(self.result), {}
        for name in (f.name for f in fields(self.result)):
            if name == "layers":
                made[name] = self._layers(context)
            elif axes.get(name, ())[:2] == ("batch", "layer"):
                made[name] = self._stacked(answers, name, axes[name], context)
            elif name in axes:
                made[name] = self._positions(context)
            elif hasattr(self, name):
                value = getattr(self, name)
                made[name] = value if isinstance(value, (str, float)) else tuple(value)
        return self.result(**made)

    def _layers(self, context: Context) -> tuple[int, ...]:
        """The layers that are asked, ascending."""
        return context.layers(self.tower, self.layers)

    def _parameters(self, context: Context) -> dict[str, Any]:
        """Parameters of the kernel; raises if those of the probe fit neither model nor sample."""
        return {}

    def _rows(self, context: Context, queries: Any) -> Tensor | None:
        """The selected queries of a prompt, ``[row query]``; None for all, and at decode steps."""
        chosen = queries is not None and not context.step
        return indices_of(context.flat(self.tower, queries)) if chosen else None

    def _positions(self, context: Context) -> Tensor:
        return context.positions(self.tower, getattr(self, self.over) if self.over else None)

    def _kept(self, context: Context) -> Tensor:
        """Which queries or keys have a value, bool ``[batch pos]``."""
        return context.live_keys(self.tower) if self.per_key else self._positions(context) >= 0

    def _stacked(
        self, answers: Mapping[Site, Any], name: str, axes: tuple[str, ...], context: Context
    ) -> Tensor | None:
        """One field of the result; None if the kernel did not give it."""
        some, kept = next(iter(answers.values())), self._kept(context)
        part = name if isinstance(some, Mapping) else None
        if part is not None and part not in some:
            return None
        if along := next((axis for axis in ("key", "query", "row", "pos") if axis in axes), None):
            at, keys = axes.index(along), kept.shape[1] if self.per_key else 0
            return mask_padding(stack_layers(answers, part, at - len(axes), keys), kept, at)
        values = stack_layers(answers, part)
        gone = ~kept.any(dim=1).reshape(-1, *[1] * (values.ndim - 1))
        return values.masked_fill(gone, float("nan")) if values.is_floating_point() else values


def chosen_of(context: Context, tower: Tower, tokens: Selection) -> Tensor | None:
    """The chosen tokens of a prompt, int ``[row chosen]``, -1 for none; None for all, and at decode steps."""
    mask = context.flat(tower, tokens)
    return None if context.step or bool(mask.all()) else indices_of(mask)


def spread(
    answers: Mapping[Site, Any], chosen: Tensor | None, like: Tensor, dim: int
) -> dict[Site, Any]:
    """Answers of chosen tokens in their places along ``dim``, among as many as in ``like`` ``[row pos]``, NaN
    elsewhere."""
    if chosen is None:
        return dict(answers)
    row, at = (chosen >= 0).nonzero(as_tuple=True)
    out = {}
    for site, answer in answers.items():
        own = answer.movedim(dim, 1)
        whole = own.new_full((len(own), like.shape[1], *own.shape[2:]), float("nan"))
        whole[row, chosen[row, at]] = own[row, at]
        out[site] = whole.movedim(1, dim)
    return out


class AttentionProbe(LayerProbe, needs="attention"):
    """A probe of attention calls. ``layers=None`` are those that attend: a layer of linear attention, a
    convolution or Mamba has no weights."""

    at_sites: ClassVar[tuple[str, ...]] = ("attention",)
    site: str = "attention"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer, whose sizes are the same in what is stacked."""
        tower, layers = context.tower(self.tower), self._layers(context)
        axes = {axis for names in axes_of(self.result).values() for axis in names}
        for axis, size in (("head", "heads"), ("kv_head", "kv_heads"), ("d_head", "d_head")):
            if axis in axes:
                tower.size(size, [layer for layer in layers if layer in tower.attending])
        return super().reads(context)

    def _layers(self, context: Context) -> tuple[int, ...]:
        """The layers asked for, or all that attend; AttentionCallError with a reason if none does."""
        tower = context.tower(self.tower)
        if self.layers is None and not tower.attending:
            tower.call(0)
        return tower.attending if self.layers is None else tower.layers(self.layers)

    def _refuse_flash(self, context: Context, what: str = "") -> None:
        """Refuse a flash kernel for what needs fp32, flex attention for all but ``what``: it has no gradient."""
        kernel, why = context.tower(self.tower).kernel, ""
        if "flash" in kernel:
            why = "computes in half precision only; expected a kernel that can compute in fp32"
        elif "flex" in kernel and not what:
            why = "has no gradient on every device; expected a kernel that has one"
        if why:
            raise ProbeError(
                f"Got {what or type(self).__name__} on the {self.tower} tower under {kernel!r}, which {why}. "
                "Write lvlm.module.set_attn_implementation('sdpa'), or load with attn_implementation='sdpa'."
            )

    def _groups(self, context: Context, groups: Any) -> ByLayer:
        """One-hot groups ``[row key group]``, one tensor per layer or one for all that share it."""
        onehot = context.pack(self.tower, context.groups(self.tower, groups).float(), dim=2)
        return ByLayer(one.contiguous() for one in onehot.unbind(1))
