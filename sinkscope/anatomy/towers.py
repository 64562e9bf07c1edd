"""Where a model keeps its blocks, attention calls, projector and head: paths and numbers only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sinkscope.anatomy.attention_call import AttentionCall, NoAttentionCall
from sinkscope.anatomy.block_sum import Branch, NoBranch
from sinkscope.checks import check_choice, is_whole, plain
from sinkscope.errors import AttentionCallError, LayerError, ModelError, ProbeError

MEASURED = ("projector", "feeds", "enters", "prefix", "suffix", "drops", "merge", "measured")
"""The fields of an `Anatomy` that are measured on inputs with a picture."""
EXPECTED = (
    "expected a list of blocks that hold attention. What the language tower can do works. If this model "
    "has such a tower, name it: ss.register_family(model_type, vision_tower='path')."
)


@dataclass(frozen=True)
class BlockProof:
    """What a pass has shown of one block: why a capability is not there, "" where it is.

    ``states`` are the residual stream at its input and output, ``attention`` its call, ``added`` what its
    branches add, ``writes`` what the output projection reads of its heads. ``sizes`` are query heads,
    key-value heads and the width of a value vector, as they were called, or None. ``follows`` is whether the
    next block reads what this one writes; ``spatial`` whether states are ``[image row column d_model]``.
    """

    states: str = ""
    attention: str = ""
    added: str = ""
    writes: str = ""
    sizes: tuple[int, int, int] | None = None
    follows: bool = True
    spatial: bool = False


@dataclass(frozen=True)
class HeadProof:
    """How a model makes logits of the last block's output: ``cap * tanh(scale * head(norm(x)) / cap)``, without
    the soft-cap where ``cap`` is 0; ``why`` not, or "". ``norm`` is the path of the final norm."""

    norm: str
    scale: float = 1.0
    cap: float = 0.0
    why: str = ""


SIZES = ("heads", "kv_heads", "d_head")


@dataclass(frozen=True)
class TowerAnatomy:
    """One tower, ``"vision"`` or ``"language"``; tuples have an entry per block, paths are dotted.

    ``neurons`` and ``projection`` are paths of the last projection of the MLP, whose inputs are the neurons,
    and of attention, or "". ``branches`` and ``calls`` tell how attention and the MLP reach the residual
    stream, and where attention is called, or why that could not be read. ``heads`` are query heads;
    ``packed`` is whether all images share one sequence without a batch axis, ``kernel`` the attention
    implementation, such as ``"sdpa"``, and ``d_mlp`` the neurons of every MLP, 0 where none were found. A
    ``learned_sink`` takes a share of attention that no token gets. A tower without blocks says why they are
    ``missing``. ``proofs`` are what a pass has shown of every block, empty before one; where sizes differ by
    block, ``heads``, ``kv_heads`` and ``d_head`` are those of the first that attends: see `size`.
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
    proofs: tuple[BlockProof, ...] = ()

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """Blocks whose attention call was found; the others have a residual stream only."""
        return tuple(i for i, call in enumerate(self.calls) if isinstance(call, AttentionCall))

    @cached_property
    def adding(self) -> tuple[int, ...]:
        """Blocks of which is known what attention and MLP add: those with attn_out and mlp_out."""
        return tuple(i for i, found in enumerate(self.branches) if isinstance(found, tuple))

    @cached_property
    def writing(self) -> tuple[int, ...]:
        """Blocks of which is known what every key writes into the stream through attention."""
        known = (i for i in self.attending if i in self.adding and self.projection[i])
        return tuple(i for i in known if not self.proof(i).writes)

    @cached_property
    def stating(self) -> tuple[int, ...]:
        """Blocks whose residual stream is one state of width ``d_model`` per token."""
        return tuple(i for i in range(self.n_layers) if not self.proof(i).states)

    def proof(self, layer: int) -> BlockProof:
        """What a pass has shown of a block; nothing before one."""
        return self.proofs[layer] if self.proofs else BlockProof()

    def proven(self, proofs: tuple[BlockProof, ...]) -> TowerAnatomy:
        """The same without what a pass has not shown, with the sizes that it has."""
        if not proofs:
            return self
        calls = [
            NoAttentionCall(p.attention) if p.attention else c
            for p, c in zip(proofs, self.calls, strict=True)
        ]
        adds = [
            NoBranch(p.added) if p.added else b for p, b in zip(proofs, self.branches, strict=True)
        ]
        found = replace(self, proofs=proofs, calls=tuple(calls), branches=tuple(adds))
        sizes = next((proofs[i].sizes for i in found.attending if proofs[i].sizes), None)
        return found if sizes is None else replace(found, **dict(zip(SIZES, sizes, strict=True)))

    def by_size(self, name: str, layers: Iterable[int]) -> dict[int, list[int]]:
        """Some blocks by their ``"heads"``, ``"kv_heads"`` or ``"d_head"``."""
        found: dict[int, list[int]] = {}
        for layer in layers:
            sizes = self.proof(layer).sizes
            number = getattr(self, name) if sizes is None else sizes[SIZES.index(name)]
            found.setdefault(number, []).append(layer)
        return found

    def size(self, name: str, layers: Iterable[int]) -> int:
        """One of these numbers for some blocks; ModelError if they differ."""
        found = self.by_size(name, layers)
        if len(found) > 1:
            each = ", ".join(f"{number} in {blocks}" for number, blocks in found.items())
            got = f"Got blocks of the {self.tower} tower whose {name} differ: {each}; expected one number"
            raise ModelError(f"{got}. Write layers={next(iter(found.values()))}.")
        return next(iter(found), getattr(self, name))

    def states(self, site: str, layer: int) -> None:
        """Refuse a site of states that does not hold one state per token; ModelError with the reason."""
        if why := self.proof(layer).states:
            raise ModelError(
                f"{self.blocks[layer]} has no site {site}: {why}.{_others(self.stating)}"
            )

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
        if why := self.proof(layer).writes:
            raise ModelError(why + _others(self.writing))
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
    (DeepStack). ViT tokens begin with those of the kinds ``prefix`` and end with those of ``suffix``, of which the projector does not see the
    first ``drops``; it makes one LLM token of ``merge`` x ``merge`` patches. These are ``measured`` on inputs
    with a picture, or else declared by the config. ``decoder`` and ``projector`` are paths, "" for none;
    ``image_token_id`` is -1 where the config names none; ``vocab`` is the number of token ids. ``lens`` is how
    logits are made of the last block's output.
    """

    model_type: str
    vision: TowerAnatomy
    language: TowerAnatomy
    decoder: str
    projector: str
    feeds: tuple[int, ...]
    lens: HeadProof
    head: str
    image_token_id: int
    vocab: int
    enters: tuple[tuple[int, int], ...] = ()
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    drops: int = 0
    merge: int = 1
    measured: bool = False

    def proven(
        self, proofs: Mapping[str, tuple[BlockProof, ...]], lens: HeadProof | None
    ) -> Anatomy:
        """The same without what a pass has not shown of the blocks of each tower, and how it made logits."""
        vision, language = (t.proven(proofs.get(t.tower, ())) for t in (self.vision, self.language))
        return replace(self, vision=vision, language=language, lens=lens or self.lens)

    @property
    def final_norm(self) -> str:
        """The path of the norm between the last block and the head, "" if none was found."""
        return self.lens.norm

    def again(self, read: Anatomy) -> Anatomy:
        """What was read anew, with what is measured here."""
        own = {name: getattr(self, name) for name in MEASURED}
        return read.measuring(own | {"packed": self.vision.packed})

    def measuring(self, found: Mapping[str, Any]) -> Anatomy:
        """The same with what was measured: the fields of `MEASURED`, and whether the vision tower packs."""
        plain = {name: found[name] for name in MEASURED}
        plain |= {name: tuple(plain[name]) for name in ("feeds", "prefix", "suffix")}
        plain["enters"] = tuple((layer, block) for layer, block in plain["enters"])
        return replace(self, vision=replace(self.vision, packed=found["packed"]), **plain)

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
        if name != "vision" and name != "language":
            check_choice(("vision", "language"), tower=name, error=ProbeError, hint=hint)
        found = self.vision if name == "vision" else self.language
        if not found.blocks:
            raise ModelError(
                f"Got the {name} tower of a model in which {found.missing}; {EXPECTED}"
            )
        return found
