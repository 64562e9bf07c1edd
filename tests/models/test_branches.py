"""attn_out and mlp_out are what is added to the residual stream, whatever lies between."""

import dataclasses

import pytest
import torch
from torch import nn

import sinkscope as ss
from sinkscope.anatomy import discovery as reading
from sinkscope.anatomy.block_sum import Branch, NoBranch, read_branches
from sinkscope.anatomy.towers import BlockProof
from sinkscope.errors import ModelError
from sinkscope.testing import TINY, random_image, tiny_llava
from tests.interventions.reference import hook_on

# Where the stream stands between attention and MLP: the first module that reads it there. Cohere
# adds both at once.
BETWEEN = {
    "clip": "layer_norm2",
    "siglip": "layer_norm2",
    "dinov2": "norm2",
    "qwen2.5-vl vision": "norm2",
    "qwen2.5-vl": "post_attention_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "llama": "post_attention_layernorm",
    "qwen2": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "gpt_oss": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "glm4": "post_attention_layernorm",
    "granite": "post_attention_layernorm",
    "cohere": None,
}
LLAVAS = [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "qwen3")]
LLAVAS += [("dinov2", name) for name in ("gpt_oss", "gemma2", "olmo2", "glm4", "granite", "cohere")]
EAGER = ("gpt_oss", "gemma2")


def make(names):
    """The model, and for both towers where the stream stands between attention and MLP."""
    if isinstance(names, str):
        vision = {"gemma3": "siglip"}.get(names, f"{names} vision")
        return ss.LVLM(*TINY[names]()), {"vision": BETWEEN[vision], "language": BETWEEN[names]}
    kernel = "eager" if names[1] in EAGER else "sdpa"
    lvlm = ss.LVLM(*tiny_llava(*names, attn_implementation=kernel))
    return lvlm, {"vision": BETWEEN[names[0]], "language": BETWEEN[names[1]]}


@torch.no_grad()
def added(lvlm, sample, tower, between):
    """What attention and MLP add, per block, as differences of the stream: by plain hooks."""
    blocks = [lvlm.module.get_submodule(path) for path in lvlm.anatomy.tower(tower).blocks]
    seen, hooks = {}, []

    def before(key):
        def keep(module, args, kwargs):
            seen[key] = args[0] if args else kwargs["hidden_states"]

        return keep

    def after(key):
        def keep(module, args, out):
            seen[key] = out[0] if isinstance(out, tuple) else out

        return keep

    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(before((i, "pre")), with_kwargs=True))
        hooks.append(block.register_forward_hook(after((i, "post"))))
        if between is None:
            hooks.append(block.mlp.register_forward_hook(after((i, "mlp"))))
        else:
            middle = getattr(block, between)
            hooks.append(middle.register_forward_pre_hook(before((i, "mid")), with_kwargs=True))
    lvlm.module(**sample.inputs)
    for hook in hooks:
        hook.remove()
    attention, mlp = [], []
    for i in range(len(blocks)):
        pre, post = seen[i, "pre"], seen[i, "post"]
        mid = post - seen[i, "mlp"] if between is None else seen[i, "mid"]
        attention.append(mid - pre)
        mlp.append(post - mid)
    return torch.stack(attention), torch.stack(mlp)


@pytest.mark.parametrize("tower", ["vision", "language"])
@pytest.mark.parametrize("names", [*LLAVAS, "qwen2.5-vl", "gemma3"], ids=str)
def test_the_sites_are_what_is_added_to_the_stream(names, tower):
    lvlm, between = make(names)
    assert len(lvlm.anatomy.tower(tower).adding) == lvlm.anatomy.tower(tower).n_layers
    sample = lvlm.prepare(images=random_image(64, 64, 3), text="what is it")
    halves = [ss.probes.ResidualStates(tower=tower, site=site) for site in ("attn_out", "mlp_out")]
    ends = [
        ss.probes.ResidualStates(tower=tower, site=site) for site in ("resid_pre", "resid_post")
    ]
    run = lvlm.run(sample, [*halves, *ends])
    layout = sample.tokens.vision.layout if tower == "vision" else None
    for probe, want in zip(halves, added(lvlm, sample, tower, between[tower]), strict=True):
        want = want if layout is None else want[:, layout[0]][:, None]
        got = run[probe].states.movedim(1, 0)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), probe.site
    if names == ("dinov2", "granite"):  # factors are looked up on the remote path, too
        there = lvlm.run(sample, halves, remote="local")
        for probe in halves:
            assert torch.equal(there[probe].states, run[probe].states)
    total = run[ends[0]].states + run[halves[0]].states + run[halves[1]].states
    post = run[ends[1]].states
    assert (total - post).abs().max() <= 1e-6 * post.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("llm", ["granite", "olmo2"])
def test_half_precision_passes_the_check_at_load(llm, dtype):
    anatomy = ss.LVLM(*tiny_llava("dinov2", llm, dtype=dtype)).anatomy
    assert anatomy.vision.adding == anatomy.language.adding == (0, 1, 2)


@pytest.mark.parametrize(
    ("names", "tower"), [(("dinov2", "llama"), "vision"), (("clip", "granite"), "language")]
)
def test_an_edit_sets_what_is_added(names, tower):
    """Where a LayerScale or a factor lies behind the module, and bitwise nothing else."""
    lvlm, between = make(names)
    sample = lvlm.prepare(images=random_image(64, 64, 3), text="what is it")
    chosen = torch.zeros_like(
        sample.tokens.live if tower == "language" else sample.tokens.vision.live
    )
    chosen[0, 3] = True
    edit = ss.AblateActivations([5, 7], chosen, 2.5, layers=[1], site="attn_out", tower=tower)
    probe = ss.probes.ResidualStates(tower=tower, site="attn_out")
    plain = lvlm.run(sample, [probe])[probe].states
    run = lvlm.run(sample, [probe], [edit])
    where = torch.zeros_like(plain[:, 1], dtype=torch.bool)
    where[0, 3, [5, 7]] = True
    assert torch.equal(run[probe].states[:, 1][~where], plain[:, 1][~where])
    hook = hook_on(
        lvlm.module.get_submodule(f"{lvlm.anatomy.tower(tower).blocks[1]}.{between[tower]}"),
        "input",
        lambda mid: torch.where(where, mid - plain[:, 1] + 2.5, mid),
    )
    # The sum between attention and MLP is not passed on from there: what the MLP adds must be as by hand.
    mlp = ss.probes.ResidualStates(layers=[1], tower=tower, site="mlp_out")
    by_hand = lvlm.run(sample, [mlp])[mlp].states
    hook.remove()
    assert (lvlm.run(sample, [mlp], [edit])[mlp].states - by_hand).abs().max() < 1e-4
    ends = [
        ss.probes.ResidualStates(layers=[1], tower=tower, site=s)
        for s in ("resid_pre", "resid_post")
    ]
    run = lvlm.run(sample, [mlp, *ends], [edit])
    pre, post = (run[end].states[:, 0] for end in ends)
    assert ((post - pre - run[mlp].states[:, 0])[where] - 2.5).abs().max() < 1e-4


# ---------------------------------------------------------------------------- reading the source


class Shape(nn.Module):
    """What the blocks below are made of; every part is linear, so that nothing but the sum matters."""

    own_factor, gated, kind = 0.5, False, "plain"

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attention, self.mlp, self.more = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.after, self.dropout, self.drop_path = nn.LayerNorm(4), nn.Dropout(0.5), nn.Identity()
        self.scale = nn.Parameter(torch.rand(4))


class Parallel(Shape):
    def forward(self, hidden_states, mask=None):
        residual = hidden_states
        hidden_states = self.norm1(hidden_states)
        wrote, weights = self.attention(hidden_states, mask)
        if self.gated:
            wrote = self.more(wrote)
        hidden_states = self.dropout(self.mlp(hidden_states)) + residual + wrote
        return (hidden_states, weights)


class Factors(Shape):
    def forward(self, x, mask=None):
        y = self.attention(self.norm1(x), mask=mask)[0]
        y = nn.functional.dropout(y, p=0.1, training=self.training)
        x = x + self.drop_path(self.after(y) * self.own_factor)
        if self.scale is not None and self.kind == "plain":
            y = self.scale * (self.mlp(self.norm2(x)) if not self.gated else self.more(x))
        else:
            y = self.more(x)
        x += y
        outputs = (x,)
        outputs += (mask,)
        return outputs


class NormedStream(Shape):
    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class ScaledStream(Shape):
    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        x *= self.scale
        return x


class OneMore(Shape):
    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y) + self.more(y)
        return x + self.mlp(self.norm2(x))


class Gated(Shape):
    def forward(self, x, gate):
        x = x + gate * self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Asked(Shape):
    def forward(self, x, mask=None):
        y = self.attention(self.norm1(x))
        if mask is not None:
            y = y.masked_fill(mask, 0)
        x = x + y
        return x + self.mlp(self.norm2(x))


class Shared(Shape):
    def forward(self, x):
        x = x + self.after(self.attention(self.norm1(x)))
        return x + self.after(self.mlp(self.norm2(x)))


class InPlace(Shape):
    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x[..., 0] = 0
        return x + self.mlp(self.norm2(x))


class Nothing(Shape):
    def forward(self, x):
        return x


class Sides(Shape):
    def forward(self, x, mask=None):
        if mask is None:
            return x + self.attention(x) + self.mlp(x)
        return x + self.mlp(x)


def without_source():
    namespace = {"Shape": Shape}
    exec("class Made(Shape):\n    def forward(self, x):\n        return x", namespace)
    return namespace["Made"]


def read(kind):
    block = kind()
    return read_branches("layers.0", block, block.attention, block.mlp, 4)


def test_ways_into_the_stream():
    assert read(Parallel) == (Branch("layers.0.attention"), Branch("layers.0.mlp"))
    first, second = read(Factors)
    way = ("layers.0.after", "layers.0.own_factor")
    assert first == Branch("layers.0.after", way[1:], way, norm=True)
    assert second == Branch("layers.0.mlp", ("layers.0.scale",), ("layers.0.scale",))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (NormedStream, "its forward returns self.norm2(x + self.mlp(x));"),
        (ScaledStream, "returns the stream * scale + attention * scale + mlp * scale;"),
        (OneMore, "returns the stream + attention + self.more(y) + mlp;"),
        (Gated, "returns the stream + gate * self.attention(self.norm1(x)) + mlp;"),
        (Asked, "returns the stream + (what depends on mask is not None) + mlp;"),
        (Sides, "returns one of several results;"),
        (Shared, "its after is called more than once;"),
        (InPlace, "its forward returns x[..., 0] + mlp;"),
        (Nothing, "its forward returns the stream;"),
        (without_source(), "its forward returns what cannot be read;"),
    ],
)
def test_what_adds_anything_else_is_refused(kind, why):
    found = read(kind)
    assert isinstance(found, NoBranch)
    start = f"layers.0 ({kind.__name__}) has no sites attn_out and mlp_out: "
    assert found.reason.startswith(start)
    assert why in found.reason
    assert "expected resid_post = resid_pre + attn_out + mlp_out. Write site=" in found.reason


# ------------------------------------------------------------------------------- without a branch


def astray(path, block, attention, mlp, width):
    """Branches that leave out what lies between them and the stream."""
    own = [
        f"{path}.{next(n for n, m in block.named_children() if m is x)}" for x in (attention, mlp)
    ]
    return Branch(own[0]), Branch(own[1])


@pytest.fixture
def misread(monkeypatch):
    """A model whose LayerScale was overlooked; the check at load must find out."""
    monkeypatch.setattr(reading, "read_branches", astray)
    return ss.LVLM(*tiny_llava("dinov2", "llama"))


def test_a_pass_at_load_finds_what_was_misread(misread):
    a = misread.anatomy
    assert misread.verified
    assert (a.vision.adding, a.vision.writing, a.language.adding) == ((), (), (0, 1, 2))
    sample = misread.prepare(images=random_image(), text="what")
    says = r"layers?\.0 .Dinov2Layer. has no sites attn_out and mlp_out: in a pass they differ by .* rounding"
    edit = ss.AblateActivations([0], "all", layers=[0], site="mlp_out", tower="vision")
    for probes, edits in (
        ([ss.TokenNorms(tower="vision", site="attn_out")], []),
        ([ss.MassiveActivations(tower="vision", site="mlp_out")], []),
        ([ss.ContributionNorms({"patch": "patch"}, tower="vision")], []),
        ([ss.HeadWrites(tower="vision")], []),
        ([], [edit]),
    ):
        with pytest.raises(ModelError, match=says):
            misread.run(sample, probes, edits)
    works = [
        ss.TokenNorms(tower="vision"),
        ss.HeadWrites(),
        ss.AttentionMass({"p": "patch"}, tower="vision"),
    ]
    misread.run(sample, works)
    before = misread.anatomy
    misread.module.set_attn_implementation("eager")
    assert misread.anatomy is not before
    assert misread.anatomy.vision.adding == ()


@pytest.mark.parametrize("where", ["drop_path", "idle"])
def test_a_pass_at_load_finds_what_does_not_run_once(monkeypatch, where):
    """One module is called twice in a block, the other one never."""

    def elsewhere(path, block, *parts):
        if type(block).__name__ != "Dinov2Layer":
            return read_branches(path, block, *parts)
        block.idle = nn.Identity()
        return Branch(f"{path}.{where}"), Branch(f"{path}.layer_scale2")

    monkeypatch.setattr(reading, "read_branches", elsewhere)
    lvlm = ss.LVLM(*tiny_llava("dinov2", "llama"))
    assert (lvlm.anatomy.vision.adding, lvlm.anatomy.language.adding) == ((), (0, 1, 2))
    sample = lvlm.prepare(images=random_image(), text="what")
    with pytest.raises(ModelError, match="attention or MLP did not run once in a pass"):
        lvlm.run(sample, [ss.TokenNorms(tower="vision", site="attn_out")])


def test_the_report_says_what_cannot_be_read(misread):
    report = misread.report()
    for name in ("ContributionNorms", "HeadWrites"):
        said = report.verdict(name, "vision")
        assert said.status == "unavailable"
        assert (
            "(Dinov2Layer) has no sites attn_out and mlp_out: in a pass they differ by" in said.why
        )
        assert report.verdict(name) == dataclasses.replace(
            said, tower="language", status="exact", why=""
        )
    for name in ("TokenNorms", "AblateActivations", "PatchActivations"):
        said = report.verdict(name, "vision")
        assert said.status == "exact"
        assert said.why.startswith("without attn_out and mlp_out: ")
        assert report.verdict(name).why == ""
    assert report.verdict("AttentionMass", "vision").why == ""
    assert "blocks add" not in report.verification
    assert report.verification.endswith("; what is not proven is unavailable below")


def test_one_block_that_cannot_be_read_leaves_the_others():
    lvlm = ss.LVLM(*tiny_llava("dinov2", "llama"))
    assert "blocks add attn_out and mlp_out" in lvlm.report().verification
    lost = [BlockProof(), BlockProof(added="blocks.1 (X) adds more; expected"), BlockProof()]
    lvlm._anatomy = lvlm.anatomy.proven({"vision": tuple(lost)}, None)
    sample = lvlm.prepare(images=random_image(), text="what")
    probe = ss.HeadWrites(tower="vision")
    with pytest.raises(ModelError, match=r"blocks.1 .X. adds more; expected Write layers=\[0, 2\]"):
        lvlm.run(sample, [probe])
    lvlm.run(sample, [ss.HeadWrites(layers=[0, 2], tower="vision")])
    report = lvlm.report()
    assert report.verdict("HeadWrites", "vision").why == "not in block 1: blocks.1 (X) adds more"
    remark = "without attn_out and mlp_out in block 1: blocks.1 (X) adds more"
    assert report.verdict("TokenNorms", "vision").why == remark


def test_a_norm_after_attention_is_reported():
    report = ss.LVLM(*tiny_llava("dinov2", "olmo2")).report()
    remark = "norms are without what the norm after attention divides a query by"
    assert report.verdict("HeadWrites").why == remark
    assert (
        report.verdict("HeadWrites", "vision").why == report.verdict("ContributionNorms").why == ""
    )


def test_heads_without_an_output_projection_are_refused():
    lvlm = ss.LVLM(*tiny_llava("dinov2", "llama"))
    vision = dataclasses.replace(
        lvlm.anatomy.vision, projection=("", *lvlm.anatomy.vision.projection[1:])
    )
    lvlm._anatomy = dataclasses.replace(lvlm.anatomy, vision=vision)
    sample = lvlm.prepare(images=random_image(), text="what")
    with pytest.raises(
        ModelError, match=r"layers?\.0\.attention has no output projection that was found"
    ):
        lvlm.run(sample, [ss.HeadWrites(tower="vision")])
    lvlm.run(sample, [ss.HeadWrites(layers=[1, 2], tower="vision")])
    said = lvlm.report().verdict("ContributionNorms", "vision")
    assert (said.status, said.why) == (
        "exact",
        "not in block 0: no output projection was found",
    )
