"""What the package claims of a model: each claim is a check of one tower against a plain pass."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from sinkscope import detectors, interventions, probes
from sinkscope.anatomy.weights import rounds
from sinkscope.errors import SinkscopeError
from sinkscope.experiments import trace_sinks
from sinkscope.models import LVLM, Sample
from sinkscope.testing import references
from sinkscope.testing.references import OtherKeysError, Reduced, UncheckedError

BOTH = ("vision", "language")
STEPS: Mapping[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
MOST = 48  # image tokens whose map is compared with the gradient
Found = tuple[float, str]
"""How far numbers are off, and a remark."""


def sentence(error: Exception) -> str:
    """The first sentence of a message."""
    return " ".join(str(error).split()).partition(". ")[0].removesuffix(".")


class Case:
    """One model and one sample, the checks, and what several of them share."""

    def __init__(self, lvlm: LVLM, sample: Sample, seed: int) -> None:
        self.lvlm, self.sample, self.tokens, self.seed = lvlm, sample, sample.tokens, seed
        self.model: Any = lvlm.module
        self.inputs = references.placed(sample.inputs, lvlm.device)
        half = self.model.dtype in (torch.float16, torch.bfloat16)
        self.half = half or rounds(self.model)  # quantised maps round, or compute in half precision
        vision, self.live = getattr(self.tokens, "vision", None), {"language": self.tokens.live}
        if vision is not None and len(vision.live):
            self.live["vision"] = vision.live
        self.layout = getattr(vision, "layout", None)

    def tower(self, name: str) -> Any:
        """A tower with blocks; UncheckedError if the model or the sample has none."""
        found = self.lvlm.anatomy.tower(name)
        if found is None or not found.n_layers or name not in self.live:
            raise UncheckedError(f"there is no {name} tower with blocks")
        return found

    def attending(self, name: str) -> list[int]:
        """The layers of a tower with an attention call."""
        if not (layers := [*(tower := self.tower(name)).attending]):
            tower.call(0)  # raises
        return layers

    def random_half(self, name: str) -> Tensor:
        """A random half of the live tokens of a tower, bool ``[row pos]``."""
        live, generator = self.live[name], torch.Generator().manual_seed(self.seed)
        return live & (torch.rand(live.shape, generator=generator) < 0.5)

    def pack(self, name: str, mask: Tensor) -> Tensor:
        """A mask of tokens in the order of the tower's own sequence."""
        if name == "language" or self.layout is None:
            return mask
        packed = torch.zeros(1, int(self.layout.max()) + 1, dtype=torch.bool)
        packed[0, self.layout[self.layout >= 0]] = mask[self.layout >= 0]
        return packed

    def live_of(self, name: str, x: Tensor, dim: int, own: bool = False) -> Tensor:
        """Values at live tokens, ``[token ...]``; with ``own`` positions, at ``dim``, are those of the tower."""
        live = self.live[name]
        if own and name == "vision" and self.layout is not None:
            return (x if x.ndim == 3 else x[None]).movedim(dim, 1)[0][self.layout[live]]
        if x.shape[:1] != live.shape[:1] or x.shape[dim] != live.shape[1]:
            error = UncheckedError if own else ValueError  # whose numbers they are
            raise error(f"values {[*x.shape]} for {[*live.shape]} {name} tokens")
        return x.movedim(dim, 1)[live]

    def off(self, got: Tensor, want: Tensor) -> float:
        """The largest difference; in half precision the root of the mean square, as states differ."""
        far = (got - want).abs()
        return float(far.square().mean().sqrt() if self.half else far.max())

    def remark(self, name: str, layers: Any, why: str = "") -> str:
        """Which layers of a tower are not checked, and why."""
        others = [i for i in range(self.tower(name).n_layers) if i not in layers]
        return f"not in layers {others}{': ' * bool(why)}{why}" if others else ""

    def layered(self, name: str, make: Any, layers: Sequence[int], field: str) -> Any:
        """A field of a probe's result by layer, and which layers it refused; raises if it refused all."""
        found, refused = {}, []
        for few in (layers, *([layer] for layer in layers)):
            try:
                probe = make(layers=few, tower=name)
                values = getattr(self.lvlm.run(self.sample, probes=[probe])[probe], field)
                found |= {layer: values[:, i] for i, layer in enumerate(few)}
            except SinkscopeError as error:
                refused.append(error)
            if not refused:
                break
        if not found:
            raise refused[0]
        return found, self.remark(name, found, *map(sentence, refused[-1:]))

    def states_of(self, name: str, sites: Sequence[str], layers: Any = None) -> list[Tensor]:
        """States of live tokens at sites of a tower, ``[token layer d_model]``."""
        where: Any = {"layers": layers, "tower": name}
        asked = [probes.ResidualStates(site=site, **where) for site in sites]
        run = self.lvlm.run(self.sample, probes=asked)
        return [self.live_of(name, run[probe].states, 2) for probe in asked]

    @cached_property
    def plain(self) -> Tensor:
        """The logits of a plain pass under the model's own kernel."""
        return references.plain_logits(self.model, self.inputs)

    @cached_property
    def weights(self) -> dict[str, Reduced]:
        """What is compared of eager attention, by path of the module; one pass."""
        homes = {}
        for name, live in self.live.items():
            seen = Reduced(self.pack(name, self.random_half(name)), self.pack(name, live))
            with suppress(UncheckedError, SinkscopeError):  # a tower that does not attend
                homes |= {self.tower(name).attention[i]: seen for i in self.attending(name)}
        with references.eager(self.model, homes, lambda path, *call: homes[path].note(path, *call)):
            self.model(**self.inputs)
        return homes

    @cached_property
    def feeding(self) -> references.Feeding:
        """How what the decoder reads depends on the vision blocks that feed it."""
        vision, language = self.tower("vision"), self.tower("language")
        if not (feeds := self.lvlm.anatomy.feed_layers):
            raise UncheckedError("no vision block is known to feed the decoder")
        after = vision.blocks[feeds[0] :], [vision.blocks[feed] for feed in feeds]
        shape = self.tokens.ids.shape
        return references.Feeding(self.model, self.inputs, *after, language.blocks[0], shape)

    @cached_property
    def truth(self) -> dict[tuple[int, int], list[tuple[int, ...]]]:
        """Image tokens ``(row, pos)`` drawn by chance, and the vision states that they depend on."""
        if not (self.tokens.sources >= 0).any():
            raise UncheckedError("the sample has no map from vision states to image tokens")
        places = (self.tokens.image >= 0).nonzero()
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(self.seed))
        some = places[order[:MOST]].tolist()
        found = {(row, pos): self.feeding.sources(row, pos) for row, pos in some}
        if not any(found.values()):
            raise UncheckedError("no embedding of an image token depends on the vision states")
        return found

    def place(self, image: int, token: int) -> tuple[int, ...]:
        """A ViT token as an address of `truth`."""
        at = (image, token) if self.layout is None else (0, int(self.layout[image, token]))
        return at[1:] if self.feeding.ndim == 2 else at

    def logits(self, name: str) -> Found:
        """A pass with probes is the plain pass."""
        asked: list[Any] = [probes.ResidualStates()]
        with suppress(SinkscopeError):
            mass = probes.AttentionMass({"all": "all"}, self.attending(name))
            self.lvlm.run(self.sample, probes=[mass])
            asked.append(mass)
        got = self.lvlm.run(self.sample, probes=asked).logits
        return float((got.float() - self.plain.float()).nan_to_num().abs().max()), ""

    def image_tokens(self, name: str) -> Found:
        """Image tokens are what the vision tower fills, and the other ones of its id (newlines)."""
        want = (self.tokens.ids == self.lvlm.anatomy.image_token_id) | self.feeding.filled()
        wrong = want & self.tokens.live != (self.tokens.image >= 0)
        return float(wrong.sum()), f"{int(want.sum())} image tokens"

    def map(self, name: str) -> Found:
        """Image tokens show the vision states on which they depend."""
        wrong = []
        for at, want in self.truth.items():
            image, few = int(self.tokens.image_index[at]), self.tokens.sources[at].tolist()
            got = sorted(self.place(image, token) for token in few if token >= 0)
            if got != want:
                wrong.append(f"; {at} shows {got[:4]}, depends on {want[:4]}")
        return float(len(wrong)), f"{len(self.truth)} image tokens{''.join(wrong[:1])}"

    def attention(self, name: str, field: str) -> Found:
        """The mass on a random half of the tokens, or what each token receives, is eager attention's."""
        layers = self.attending(name)
        make: Any = partial(probes.ReceivedAttention, null=False)
        if field == "mass":
            make = partial(probes.AttentionMass, {"half": self.random_half(name)}, null=False)
        found, why = self.layered(name, make, layers, field)
        off = 0.0
        for layer, got in found.items():
            path = self.tower(name).attention[layer]
            try:
                want = self.weights[path].whole(path, int(field == "received"))
            except OtherKeysError as error:
                if name == "vision":
                    raise
                return math.inf, str(error)
            got = self.live_of(name, got[..., 0] if field == "mass" else got, 2)
            off = max(off, self.off(got, self.live_of(name, want, 2, own=True)))
        return off, why

    def states(self, name: str) -> Found:
        """The residual stream is what goes into blocks, and what comes out of them."""
        paths, worst = self.tower(name).blocks, 0.0
        truth = references.block_states(self.model, self.inputs, paths)
        for i, states in enumerate(self.states_of(name, ("resid_pre", "resid_post"))):
            for layer, path in enumerate(paths):
                want = self.live_of(name, truth[path][i], 1, own=True)
                worst = max(worst, float((states[:, layer] - want).abs().max() / want.abs().max()))
        return worst, ""

    def additions(self, name: str) -> Found:
        """Where the branches of blocks are known, ``resid_pre + attn_out + mlp_out`` is ``resid_post``."""
        tower, sites = self.tower(name), ("resid_pre", "attn_out", "mlp_out", "resid_post")
        if not (layers := tower.adding):
            tower.branch("attn_out", 0)  # raises
        pre, attention, mlp, post = self.states_of(name, sites, layers)
        size = sum(x.norm(dim=-1) for x in (pre, attention, mlp))
        far = (pre + attention + mlp - post).norm(dim=-1) / size
        return float(far.max()), self.remark(name, layers)

    def contributions(self, name: str) -> Found:
        """What all keys write is what attention adds, without the bias of its projection."""
        tower = self.tower(name)
        if not (layers := [*tower.writing]):
            tower.write(self.attending(name)[0])  # raises
        make = partial(probes.ContributionNorms, {"all": "all"})
        found, why = self.layered(name, make, layers, "norms")
        parts = [
            (tower.blocks[i], tower.branch("mlp_out", i).path, tower.projection[i]) for i in found
        ]
        truth, off = references.attention_adds(self.model, self.inputs, parts), 0.0
        for layer, got in found.items():
            both = (self.live_of(name, x, 1, own=True) for x in truth[tower.blocks[layer]])
            want, before = (x.norm(dim=-1) for x in both)
            lost = 8 * torch.finfo(self.model.dtype).eps * before  # in the difference of two states
            far = ((self.live_of(name, got[..., 0], 1) - want).abs() - lost) / want
            off = max(off, float(far.max()))
        return off, why

    def lens(self, name: str) -> Found:
        """The lens on the last layer gives the model's own log-probabilities."""
        lens = probes.LogitLens(layers=[self.tower(name).n_layers - 1])
        got = self.lvlm.run(self.sample, probes=[lens])[lens]
        rows = torch.arange(len(self.sample))
        last = self.plain[rows, self.tokens.last].float().log_softmax(-1)
        want = last.topk(got.tokens.shape[-1]).values, last.gather(-1, got.tokens[:, 0, 0])
        return float(max((got.logprobs[:, 0, 0] - x).abs().max() for x in want)), ""

    def edit(self, name: str, kind: Any, how: str, **given: float) -> Found:
        """An edit of every second token moves the logits as the same edit inside eager attention does."""
        layers, live, image = self.attending(name), self.live[name], self.tokens.image >= 0
        if name == "vision":  # of later blocks nothing is read
            feeds = self.lvlm.anatomy.feed_layers
            layers = [i for i in layers if i <= max(feeds, default=0)] or layers
        few = sorted({layers[0], layers[-1]})
        chosen = live & (torch.arange(live.shape[1]) % 2 == 1)
        if name == "language" and image.any():
            chosen &= image
        asked = kind(chosen, layers=few, tower=name, **given)
        edited = self.lvlm.run(self.sample, interventions=[asked])
        paths, logits = [self.tower(name).attention[layer] for layer in few], []
        for change in (None, references.changed(how, self.pack(name, chosen), **given)):
            with references.eager(self.model, paths, change=change):
                logits.append(references.plain_logits(self.model, self.inputs))
        pairs = (edited.logits, logits[1]), (logits[0], self.plain), logits
        far, noise, moved = (
            float((x.float() - y.float())[self.tokens.live].norm()) for x, y in pairs
        )
        if moved <= 8 * noise:
            raise UncheckedError(
                f"the edit moves the logits by {moved:.2g}, the kernel by {noise:.2g}"
            )
        return max(far - 4 * noise, 0.0) / moved, f"in layers {few}"

    def generation(self, name: str) -> Found:
        """The answer is the model's own, and masses at a decode step are those of eager attention."""
        layers, half, off = [*self.tower(name).attending], self.random_half(name), 0.0
        paths = [self.tower(name).attention[i] for i in layers]
        probe = probes.AttentionMass({"half": half}, layers, null=False)
        want, _ = references.generated(self.model, self.inputs, STEPS)
        for asked in ([], [probe] * bool(layers)):
            out = self.lvlm.generate(self.sample, probes=asked, **STEPS)
            if not torch.equal(got := out.sequences, want):
                return math.inf, f"tokens {got[:, -4:].tolist()} for {want[:, -4:].tolist()}"
        _, weights = references.generated(self.model, self.inputs, STEPS, paths)
        keys = torch.nn.functional.pad(half, (0, 1))[:, None, None]  # and the new token
        for i, path in enumerate(paths):
            mass = (weights[path] * keys[..., -weights[path].shape[-1] :]).sum(-1)
            off = max(off, self.off(out.steps[1][probe].mass[:, i, ..., 0], mass))
        return off, self.remark(name, layers)

    def traces(self, name: str) -> Found:
        """`trace_sinks` gives the same twice; V-sinks are the image tokens of flagged ViT tokens."""
        v, truth = None, {}
        low = detectors.SinkDimensions([1], 0.1 * self.tower(name).d_model ** 0.5)
        with suppress(UncheckedError, SinkscopeError):  # without a map there are no V-sinks
            truth, last = self.truth, self.lvlm.anatomy.feed_layers[-1:]
            norms = self.states_of("vision", ["resid_post"], last)[0].norm(dim=-1)
            v = detectors.Norm(float(norms.quantile(0.8)))
        trace, again = (trace_sinks(self.lvlm, self.sample, v, low) for _ in "12")
        if trace.to_json() != again.to_json():
            return math.inf, "two traces of one sample differ"
        wrong = 0
        if truth:
            flags = trace.v_detection.mask[:, [*trace.feeds]].any(dim=1).nonzero().tolist()
            sinks = {self.place(image, token) for image, token in flags}
            wrong = sum(bool(sinks & {*at}) != bool(trace.v_sinks[p]) for p, at in truth.items())
        return float(wrong), f"{len(trace.records)} records, {int(trace.v_sinks.sum())} V-sinks"


edits: Any = partial(partial, Case.edit)
PLAN: Mapping[str, Any] = {  # check, limit in fp32 and in half precision, towers
    "logits": (Case.logits, 0.0, 0.0, "language"),
    "tokens": (Case.image_tokens, 0.0, 0.0, "language"),
    "map": (Case.map, 0.0, 0.0, "language"),
    "mass": (partial(Case.attention, field="mass"), 1e-4, 2e-2, *BOTH),
    "received": (partial(Case.attention, field="received"), 1e-4, 2e-2, *BOTH),
    "states": (Case.states, 1e-6, 1e-6, *BOTH),
    "additions": (Case.additions, 1e-5, 2e-2, *BOTH),
    "contributions": (Case.contributions, 1e-3, 5e-2, *BOTH),
    "lens": (Case.lens, 1e-3, 5e-2, "language"),
    "mask keys": (edits(kind=interventions.MaskKeys, how="mask"), 1e-3, 0.5, *BOTH),
    "scale keys": (edits(kind=interventions.ScaleKeys, how="keys", factor=0.5), 1e-3, 0.5, *BOTH),
    "value edits": (edits(kind=interventions.AblateValues, how="values"), 1e-3, 0.5, *BOTH),
    "generation": (Case.generation, 1e-4, 2e-2, "language"),
    "trace_sinks": (Case.traces, 0.0, 0.0, "language"),
}
