"""Mean states of token groups over a data set: what linear probes are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.errors import InputError, SelectionError
from sinkscope.experiments.trace import SinkTrace, trace_sinks
from sinkscope.probes import GroupMeans

if TYPE_CHECKING:
    from sinkscope.detectors.rules import Detector
    from sinkscope.experiments.probing.labelled import LabelledImage
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample


def v_sinks(trace: SinkTrace) -> Tensor:
    """V-sinks, bool ``[batch pos]``."""
    return trace.v_sinks


def l_sinks(trace: SinkTrace) -> Tensor:
    """L-sinks of every layer, bool ``[batch layer pos]``."""
    return trace.l_sinks()


def ordinary(trace: SinkTrace) -> Tensor:
    """Image tokens that are sinks at no layer, bool ``[batch pos]``."""
    return trace.ordinary()


@dataclass(frozen=True)
class RandomGroup:
    """A group of random tokens, drawn several times.

    Choi et al. (2604.03316) compare sinks with 5 ordinary image tokens, drawn 5 times: about 1 % of
    576. A row with fewer than ``n`` candidates has no such group.

    Args:
        n: How many tokens per draw, without replacement.
        repeats: How many draws; each is a probe of its own.
        among: The candidates: a function of the `SinkTrace` or a name of the `TokenMap`, such as
            ``"image"``.

    Raises:
        InputError: If a number is below 1.
    """

    n: int = 5
    repeats: int = 5
    among: Callable[[SinkTrace], Tensor] | str = ordinary

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("repeats", self.repeats)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"Got {name}={value!r}; expected a whole number of at least 1.")

    def draw(self, candidates: Tensor, seeds: Sequence[Sequence[int]]) -> list[Tensor]:
        """The draws, bool ``[batch pos]`` each.

        Args:
            candidates: Bool ``[batch pos]``.
            seeds: A seed per row. The draw depends on it and on the order of the row's candidates,
                so not on the batch nor on its padding.
        """
        out = [torch.zeros_like(candidates) for _ in range(self.repeats)]
        for row, seed in enumerate(seeds):
            places = candidates[row].nonzero().flatten()
            if len(places) < self.n:
                continue
            rng = np.random.default_rng(seed)
            for mask in out:
                mask[row, places[rng.choice(len(places), self.n, replace=False)]] = True
        return out


Group = Callable[[SinkTrace], Tensor] | RandomGroup | str
"""Tokens by name, by a function of the trace, or random ones."""


def sink_groups(n: int = 5, repeats: int = 5) -> dict[str, Group]:
    """V-sinks, L-sinks and random ordinary image tokens: the groups of Choi et al. (2604.03316).

    Args:
        n: How many ordinary tokens per draw.
        repeats: How many draws.

    Returns:
        Name -> group. Add your own: ``{**sink_groups(), "last token": "last"}``.
    """
    return {"V-sinks": v_sinks, "L-sinks": l_sinks, "ordinary": RandomGroup(n, repeats)}


def check_groups(groups: Any) -> dict[str, Group]:
    """Groups by name.

    Raises:
        InputError: If there is none, or one is neither a name, a function nor `RandomGroup`.
    """
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(
            f"Got groups={groups!r}; expected a dict such as {{'image': 'image', 'V-sinks': lambda "
            "trace: trace.v_sinks}."
        )
    for name, group in groups.items():
        fits = isinstance(group, (str, RandomGroup)) or callable(group)
        if not isinstance(name, str) or not fits:
            raise InputError(
                f"Got the group {name!r}: {type(group).__name__}; expected a name and a selection "
                "by name, a function of the trace, or RandomGroup. A mask belongs to one sample: "
                "write a function such as lambda trace: trace.v_sinks."
            )
    return dict(groups)


def needs_trace(groups: Mapping[str, Group]) -> bool:
    """Whether some group is decided on a `SinkTrace`."""
    among = [g.among if isinstance(g, RandomGroup) else g for g in groups.values()]
    return any(callable(group) for group in among)


@dataclass(frozen=True, eq=False)
class Features:
    """Mean states of every record.

    Attributes:
        layers: The block indices, in order.
        columns: Group -> which columns hold its draws (one column but for random tokens).
        means: Per batch, fp32 ``[batch layer column d_model]``, NaN where the group is empty.
        counts: Int ``[record layer column]``, how many tokens.
    """

    layers: tuple[int, ...]
    columns: Mapping[str, Sequence[int]]
    means: Sequence[Tensor]
    counts: np.ndarray

    def of(self, layer: int, group: str) -> list[np.ndarray]:
        """The features of a group at a layer, float64 ``[record d_model]`` for every draw."""
        at = self.layers.index(layer)
        return [
            torch.cat([part[:, at, column] for part in self.means]).double().numpy()
            for column in self.columns[group]
        ]

    def count(self, layer: int, group: str) -> np.ndarray:
        """How many tokens the group has, int ``[record]``."""
        return self.counts[:, self.layers.index(layer), self.columns[group][0]]


def pool(
    lvlm: LVLM,
    items: Sequence[LabelledImage],
    groups: Mapping[str, Group],
    rules: tuple[Detector, Detector] | None,
    *,
    layers: tuple[int, ...],
    site: str,
    batch: int,
    seed: int,
    remote: bool | str | None,
    hidden: bool,
) -> Features:
    """Mean states of every group, layer and record.

    One pass per batch finds the sinks, if a group asks for them, and one reads the means.

    Raises:
        InputError: If a function gives something else than a mask of the batch.
    """
    columns, means, counts = _columns(groups), [], []
    with tqdm(total=len(items), desc="reading", unit="record", disable=hidden) as bar:
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            sample = prepare(lvlm, part)
            trace = None if rules is None else trace_sinks(lvlm, sample, *rules, remote=remote)
            seeds = [(seed, start + i) for i in range(len(part))]
            probe = GroupMeans(_masks(lvlm, sample, trace, groups, seeds), layers, site=site)
            result = lvlm.run(sample, [probe], logits="last", remote=remote)[probe]
            means.append(result.means)
            counts.append(result.count)
            bar.update(len(part))
    return Features(layers, columns, means, torch.cat(counts).numpy())


def prepare(lvlm: LVLM, items: Sequence[LabelledImage]) -> Sample:
    """One batch of records."""
    return lvlm.prepare(images=[i.image for i in items], text=[i.question for i in items])


def _columns(groups: Mapping[str, Group]) -> dict[str, list[int]]:
    """Group -> its columns."""
    out, start = {}, 0
    for name, group in groups.items():
        n = group.repeats if isinstance(group, RandomGroup) else 1
        out[name] = list(range(start, start + n))
        start += n
    return out


def _masks(
    lvlm: LVLM,
    sample: Sample,
    trace: SinkTrace | None,
    groups: Mapping[str, Group],
    seeds: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """A mask per column."""
    out: list[Tensor] = []
    n_layers = lvlm.anatomy.language.n_layers
    for name, group in groups.items():
        chosen: Any = group.among if isinstance(group, RandomGroup) else group
        try:
            chosen = chosen(trace) if callable(chosen) else chosen
            mask = sample.tokens.select(chosen, n_layers)
        except SelectionError as error:
            raise InputError(f"The group {name!r}: {error}") from error
        if not isinstance(group, RandomGroup):
            out.append(mask)
            continue
        if mask.ndim != 2:
            raise InputError(
                f"The group {name!r} draws among a mask of shape {tuple(mask.shape)}; expected the "
                "same candidates at all layers, [batch pos]. Write mask.all(dim=1) in the function."
            )
        out += group.draw(mask, seeds)
    return {str(i): mask for i, mask in enumerate(out)}
