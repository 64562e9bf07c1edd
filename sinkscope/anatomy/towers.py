"""Where a model keeps its blocks, attention calls, projector and head: paths and numbers only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sinkscope.anatomy.attention_call import AttentionCall, NoAttentionCall
from sinkscope.anatomy.block_sum import Branch, NoBranch
from sinkscope.checks import check_choice, is_whole, plain
from sinkscope.errors import AttentionCallError, LayerError, ModelError, ProbeError

EXPECTED = (
    "expected a list of blocks that hold attention. What the language tower can do works. If this model "
    "has such a tower, name it: ss.register_family(model_type, vision_tower='path')."
)


@dataclass(frozen=True)
class TowerAnatomy:
    """One tower, ``"vision"`` or ``"language"``; tuples have an entry per block, paths are dotted.

    ``neurons`` and ``projection`` are paths of the last projection of the MLP, whose inputs are the neurons,
    and of attention, or "". ``branches`` and ``calls`` tell how attention and the MLP reach the residual
    stream, and where attention is called, or why that could not be read. ``heads`` are query heads;
    ``packed`` is whether all images share one sequence without a batch axis, ``kernel`` the attention
    implementation, such as ``"sdpa"``, and ``d_mlp`` the neurons of every MLP, 0 where none were found. A
    ``learned_sink`` takes a share of attention that no token gets. A tower without blocks says why they are
    ``missing``.
    """

    tower: str
    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    branches: tuple[tuple[Branch, Branch] | NoBranch, ...]
    neurons: tuple[str, ...]
    projection: tuple[str, ...]
    calls: tuple[AttentionCall | NoAttentionCall, ...]
    d_model: int
    heads: int
    kv_heads: int
    d_head: int
    packed: bool
    kernel: str = "sdpa"
    learned_sink: bool = False
    softcap: bool = False
    d_mlp: int = 0
    missing: str = ""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def attending(self) -> tuple[int, ...]:
        """Blocks whose attention call was found; the others have a residual stream only."""
        return tuple(i for i, call in enumerate(self.calls) if isinstance(call, AttentionCall))

    @property
    def adding(self) -> tuple[int, ...]:
        """Blocks of which is known what attention and MLP add: those with attn_out and mlp_out."""
        return tuple(i for i, found in enumerate(self.branches) if isinstance(found, tuple))

    @property
    def writing(self) -> tuple[int, ...]:
        """Blocks of which is known what every key writes into the stream through attention."""
        return tuple(i for i in self.attending if i in self.adding and self.projection[i])

    def call(self, layer: int) -> AttentionCall:
        """The attention call of a block; AttentionCallError if it was not found in the source."""
        if isinstance(found := self.calls[layer], NoAttentionCall):
            raise AttentionCallError(found.reason + _others(self.attending))
        return found

    def branch(self, site: str, layer: int) -> Branch:
        """How attention (``"attn_out"``) or the MLP (``"mlp_out"``) of a block reaches the stream; ModelError
        if it could not be read, or was not what a pass has added."""
        if isinstance(found := self.branches[layer], NoBranch):
            raise ModelError(found.reason + _others(self.adding))
        return found[0 if site == "attn_out" else 1]

    def write(self, layer: int) -> tuple[str, tuple[str, ...]]:
        """The paths of the output projection of heads, and of what follows it; ModelError if unknown."""
        through = self.branch("attn_out", layer).through
        if not self.projection[layer]:
            raise ModelError(
                f"{self.attention[layer]} has no output projection that was found; expected a linear "
                "map of its heads. AttentionMass and ValueNorms work here; please report this class."
            )
        return self.projection[layer], through

    def layers(self, layers: Any) -> tuple[int, ...]:
        """Ascending layers without repeats, of None for all, one 0-based index, or several; LayerError if an
        index is negative, no integer, or beyond the last block."""
        if layers is None:
            return tuple(range(self.n_layers))
        layers = plain(layers)  # of a tensor of one number
        several = isinstance(layers, Iterable) and not isinstance(layers, str)
        wanted: list[Any] = list(layers) if several else [layers]
        last = self.n_layers - 1
        for layer in wanted:
            if not is_whole(layer, 0, last):
                kind = "" if is_whole(layer) else f" of type {type(layer).__name__}"
                raise LayerError(
                    f"Got layer {layer!r}{kind} in the {self.tower} tower; expected 0 to {last}, never "
                    f"negative: write {last} for the last block. Write layers=[0, 1]; layers=None for all."
                )
        if not wanted:
            raise LayerError("Got no layers; expected at least one. Write layers=None for all.")
        return tuple(sorted({int(layer) for layer in wanted}))


def _others(layers: tuple[int, ...]) -> str:
    """Which blocks still work, as the end of a message."""
    return f" Write layers={list(layers)} for the rest." if layers else ""


@dataclass(frozen=True)
class Anatomy:
    """What sinkscope knows about a model's layout: both towers, the paths of other parts, and numbers.

    ``feeds`` are the vision blocks whose ``resid_post`` feeds the projector, in the order it reads them;
    ``enters`` are pairs of a decoder layer above 0 and a vision block whose states are added to its input
    (DeepStack). ViT tokens begin with those of the kinds ``prefix``, of which the projector does not see the
    first ``drops``; it makes one LLM token of ``merge`` x ``merge`` patches. These are ``measured`` on inputs
    with a picture, or else declared by the config. ``decoder`` and ``projector`` are paths, "" for none;
    ``image_token_id`` is -1 where the config names none; ``vocab`` is the number of token ids.
    """

    model_type: str
    vision: TowerAnatomy
    language: TowerAnatomy
    decoder: str
    projector: str
    feeds: tuple[int, ...]
    final_norm: str
    head: str
    image_token_id: int
    vocab: int
    enters: tuple[tuple[int, int], ...] = ()
    prefix: tuple[str, ...] = ()
    drops: int = 0
    merge: int = 1
    measured: bool = False

    def without(self, missing: Mapping[tuple[str, int], NoBranch]) -> Anatomy:
        """The same with the branches of some blocks, ``(tower, layer)``, given up for a reason."""

        def kept(tower: TowerAnatomy) -> TowerAnatomy:
            found = (missing.get((tower.tower, i), it) for i, it in enumerate(tower.branches))
            return replace(tower, branches=tuple(found))

        return replace(self, vision=kept(self.vision), language=kept(self.language))

    def again(self, read: Anatomy) -> Anatomy:
        """What was read anew, with what is measured here."""
        names = ("projector", "feeds", "enters", "prefix", "drops", "merge", "measured")
        vision = replace(read.vision, packed=self.vision.packed)
        return replace(read, vision=vision, **{name: getattr(self, name) for name in names})

    @property
    def feed_layers(self) -> tuple[int, ...]:
        """The blocks of `feeds`, ascending and without repeats."""
        return tuple(sorted(set(self.feeds)))

    @property
    def reaching(self) -> tuple[int, ...]:
        """The vision blocks whose output reaches the decoder, ascending: `feeds`, and those that enter above."""
        return tuple(sorted({*self.feeds, *(block for _, block in self.enters)}))

    def tower(self, name: str) -> TowerAnatomy:
        """The tower of that name; ProbeError if it is neither ``"vision"`` nor ``"language"``."""
        hint = "Write tower='vision' for a ViT."
        check_choice(("vision", "language"), tower=name, error=ProbeError, hint=hint)
        found = self.vision if name == "vision" else self.language
        if not found.blocks:
            raise ModelError(
                f"Got the {name} tower of a model in which {found.missing}; {EXPECTED}"
            )
        return found
