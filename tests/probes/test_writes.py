"""What groups and keys write is what arrives in the stream: by hand from eager attention."""

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import BitNetConfig

import sinkscope as ss
from sinkscope.errors import ModelError
from sinkscope.testing import TINY, random_image, tiny, tiny_llava
from tests.reference import language_attention, projected_values, vision_attention

# (tower, decoder): LayerScale, a norm after attention, a factor, and nothing.
CASES = {
    "dinov2": (("dinov2", "llama"), "vision"),
    "clip": (("clip", "llama"), "vision"),
    "llama": (("clip", "llama"), "language"),
    "olmo2": (("clip", "olmo2"), "language"),
    "gemma2": (("clip", "gemma2"), "language"),
    "glm4": (("clip", "glm4"), "language"),
    "granite": (("clip", "granite"), "language"),
    "gemma3": ("gemma3", "language"),
}


class Case:
    """A model, a sample, and its attention by hand: weights, values, what is projected."""

    def __init__(self, name):
        model, self.tower = CASES[name]
        kernel = {"attn_implementation": "eager"}
        made = TINY[model](**kernel) if isinstance(model, str) else tiny_llava(*model, **kernel)
        self.name, self.lvlm = name, ss.LVLM(*made)
        self.anatomy = self.lvlm.anatomy.tower(self.tower)
        self.sample = self.lvlm.prepare(images=random_image(64, 64, 3), text="what is it")
        inputs, module = self.sample.inputs, self.lvlm.module
        if self.tower == "vision":
            self.weights = vision_attention(self.lvlm, self.sample)[0]
        else:
            self.weights = language_attention(self.lvlm, inputs)[0]
        values = projected_values(module, self.lvlm, inputs, self.tower)[0]
        share = self.anatomy.heads // self.anatomy.kv_heads
        self.values = values.repeat_interleave(share, dim=1)
        self.blocks = [module.get_submodule(path) for path in self.anatomy.blocks]
        self.n_keys = self.values.shape[2]

    def projection(self, layer):
        """W_O as [d_model head d_head], and its bias."""
        linear = self.lvlm.module.get_submodule(self.anatomy.projection[layer])
        bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
        return linear.weight.unflatten(1, (self.anatomy.heads, -1)), bias

    def added(self, layer, total, part):
        """What the block adds of a part ``[... query d_model]`` of attention's output."""
        block = self.blocks[layer]
        if self.name == "dinov2":
            return part * block.layer_scale1.lambda1
        if self.name == "granite":
            return part * 0.22
        if self.name in ("clip", "llama"):
            return part
        return part * self.gain(layer) / self.size(layer, total)

    def gain(self, layer):
        """The weights of the norm after attention."""
        block = self.blocks[layer]
        norm = block.post_self_attn_layernorm if self.name == "glm4" else None
        norm = block.post_attention_layernorm if norm is None else norm
        return norm.weight + (1 if self.name.startswith("gemma") else 0)

    def size(self, layer, total):
        """What the norm after attention divides every query by."""
        eps = self.lvlm.module.config.get_text_config().rms_norm_eps
        return (total.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    @torch.no_grad()
    def contributions(self, layer, keys):
        """What keys (bool) write, per head ``[head query d_model]``, and what the bias adds."""
        matrix, bias = self.projection(layer)
        heads = torch.einsum("hqk,hkd,ohd->hqo", self.weights[layer], self.values[layer], matrix)
        total = heads.sum(0) + bias
        part = torch.einsum(
            "hqk,k,hkd,ohd->hqo", self.weights[layer], keys.float(), self.values[layer], matrix
        )
        return self.added(layer, total, part), self.added(layer, total, bias.expand_as(total))


@pytest.fixture(scope="module")
def case():
    made = {}
    return lambda name: made.setdefault(name, Case(name)) if name not in made else made[name]


def relative(got, want):
    return float(((got - want).abs().max() / want.abs().max()).detach())


@pytest.mark.parametrize("name", CASES)
def test_contributions_are_what_a_group_adds_to_the_stream(case, name):
    """Groups beside the bias make up attn_out, vector by vector; norms of each are as by hand."""
    c = case(name)
    first = torch.zeros(1, c.n_keys, dtype=torch.bool)
    first[:, :4] = True
    groups = {"first": first, "rest": ~first, "all": "all"}
    probe = ss.ContributionNorms(groups, tower=c.tower)
    states = ss.probes.ResidualStates(tower=c.tower, site="attn_out")
    run = c.lvlm.run(c.sample, [probe, states])
    got = run[probe]
    for layer in range(c.anatomy.n_layers):
        attn_out, parts = run[states].states[0, layer], []
        for i, keys in enumerate((first[0], ~first[0], first[0] | ~first[0])):
            by_head, bias = c.contributions(layer, keys)
            parts.append(by_head.sum(0))
            assert relative(got.norms[0, layer, :, i], parts[-1].norm(dim=-1)) < 1e-5
            assert relative(got.per_head[0, layer, ..., i], by_head.norm(dim=-1)) < 1e-4
        assert relative(parts[0] + parts[1] + bias, attn_out) < 1e-5
        assert relative(got.norms[0, layer, :, 2], (attn_out - bias).norm(dim=-1)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_head_writes_are_what_arrives_in_the_stream(case, name):
    """u = D W_O v with D all that lies between; a norm's division by the query is in the rank."""
    c = case(name)
    probe = ss.HeadWrites(tower=c.tower)
    got = c.lvlm.run(c.sample, [probe])[probe]
    for layer in range(c.anatomy.n_layers):
        with torch.no_grad():
            matrix, _ = c.projection(layer)
            write = torch.einsum("hkd,ohd->hko", c.values[layer], matrix)
            if name in ("olmo2", "gemma2", "glm4", "gemma3"):
                write = write * c.gain(layer)
            else:
                write = c.added(layer, None, write)
            by_head, _ = c.contributions(layer, torch.ones(c.n_keys))
            spectrum = torch.linalg.svdvals(by_head.double()).pow(2)
        norms = write.norm(dim=-1)
        assert relative(got.norms[0, layer], norms) < 1e-4
        others = (norms.sum(-1, keepdim=True) - norms) / (c.n_keys - 1)
        assert relative(got.ratio()[0, layer], norms / others) < 1e-4
        rank = spectrum.sum(-1) / spectrum.amax(-1)
        assert relative(got.stable_rank[0, layer], rank) < 1e-3


class Int8(nn.Module):
    """A linear layer in 8 bit, as quantisers make them: `weight` holds integers, nothing is a parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Wrapper(nn.Module):
    """A user's own low-rank change of a layer, without a weight of its own."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.down = nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted(**options):
    def change(module, name):
        config = peft.LoraConfig(target_modules=[name], init_lora_weights=False, r=4, **options)
        peft.inject_adapter_in_model(config, module)
        for found in module.modules():  # as a trained one: at first DoRA is LoRA
            for magnitude in getattr(found, "lora_magnitude_vector", {}).values():
                nn.init.uniform_(magnitude.weight, 1, 2)

    return change


def each(change):
    """Change every module of a name; what is returned takes its place."""

    def changes(module, name):
        for path, found in list(module.named_modules()):
            if path.rpartition(".")[2] == name:
                new = change(found)
                if isinstance(new, nn.Module):
                    module.set_submodule(path, new)

    return changes


def hooked(hook):
    return each(lambda found: found.register_forward_hook(hook))


HELD = {
    "lora": adapted(),
    "dora": adapted(use_dora=True),
    "8 bit": each(Int8),
    "wrapper": each(Wrapper),
    "offloaded": each(lambda found: accelerate.cpu_offload(found, "cpu")),
    "hook": hooked(lambda module, args, out: 1.5 * out.flip(-1) + 0.1),
    "pre-hook": each(lambda found: found.register_forward_pre_hook(lambda m, x: 2 * x[0].flip(-1))),
}
"""How a layer may be held so that its `weight` is not what it applies."""
PROJECTIONS = {"language": "o_proj", "vision": "out_proj"}


@torch.no_grad()
def by_hooks(lvlm, sample, path):
    """In plain transformers: what a module is given, what it writes, and its answer to zero."""
    seen, module = [], lvlm.module.get_submodule(path)
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]), prepend=True)
    lvlm.module(**sample.inputs)
    hook.remove()
    return module, seen[0], module(seen[0]), module(torch.zeros_like(seen[0]))


def held(change, tower="language", llm="llama", **options):
    torch.manual_seed(0)
    module, processor = tiny_llava("clip", llm, **options)
    change(module, PROJECTIONS[tower])
    lvlm = ss.LVLM(module.eval(), processor)
    return lvlm, lvlm.prepare(images=random_image(64, 64, 3), text="what is it")


@pytest.mark.parametrize("tower", PROJECTIONS)
@pytest.mark.parametrize("how", HELD)
def test_writes_are_those_of_the_module_however_it_is_held(how, tower):
    """Given a head's outputs alone, the projection writes what that head writes."""
    lvlm, sample = held(HELD[how], tower)
    anatomy = lvlm.anatomy.tower(tower)
    probe, writes = ss.ContributionNorms({"all": "all"}, tower=tower), ss.HeadWrites(tower=tower)
    values = ss.probes.AttentionValues(tower=tower)
    run = lvlm.run(sample, [probe, writes, values])
    for layer in range(anatomy.n_layers):
        module, given, out, zero = by_hooks(lvlm, sample, anatomy.projection[layer])
        assert relative(run[probe].norms[:, layer, :, 0], (out - zero).norm(dim=-1)) < 1e-5
        value = run[values].values[:, layer].repeat_interleave(anatomy.heads // anatomy.kv_heads, 1)
        for head in range(anatomy.heads):
            mine = slice(head * anatomy.d_head, (head + 1) * anatomy.d_head)
            for heads_out, got in (
                (given[..., mine], run[probe].per_head[:, layer, head, :, 0]),
                (value[:, head], run[writes].norms[:, layer, head]),
            ):
                alone = torch.zeros_like(given)
                alone[..., mine] = heads_out
                with torch.no_grad():
                    want = (module(alone) - zero).norm(dim=-1)
                assert relative(got, want) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_bias_does_not_round_the_answers_away(dtype):
    """In half precision a weight is lost beside a bias of 100 times its size, unless scaled up."""

    def biased(linear):
        nn.init.constant_(linear.bias, 20.0)

    lvlm, sample = held(each(biased), "vision", dtype=dtype)
    path = lvlm.anatomy.vision.projection[1]
    probe = ss.ContributionNorms({"all": "all"}, tower="vision", layers=[1])
    got = lvlm.run(sample, [probe])[probe].norms[0, 0, :, 0]
    module, given, _, _ = by_hooks(lvlm, sample, path)
    want = (given.float() @ module.weight.float().T).norm(dim=-1)
    assert relative(got, want[0]) < 1e-2


def last_only(module, args, out):
    return torch.cat([out[:, :-1], 2 * out[:, -1:]], dim=1)


REFUSED = {
    "bent": (hooked(lambda module, args, out: out.tanh()), "llama"),
    "bent for one token": (hooked(last_only), "llama"),
    "normed before it": (lambda module, name: None, "bitnet"),
}
SAYS = {
    "llama": r"layers\.0\.self_attn\.o_proj \(Linear\) is not a linear map of attention's output: off",
    "bitnet": r"What .*layers\.0\.self_attn \(BitNetAttention\) adds to the stream is not what its "
    r"heads write through .*layers\.0\.self_attn\.o_proj \(Linear\): off by up to",
}


@pytest.mark.parametrize("probe", [ss.ContributionNorms({"all": "all"}), ss.HeadWrites()])
@pytest.mark.parametrize("how", REFUSED)
def test_what_is_not_linear_or_does_not_arrive_is_refused(how, probe, monkeypatch):
    change, llm = REFUSED[how]
    monkeypatch.setattr(tiny, "LLMS", {**tiny.LLMS, "bitnet": BitNetConfig})
    lvlm, sample = held(change, llm=llm)
    if llm == "bitnet":  # which a pass at load has seen
        with pytest.raises(ModelError, match="o_proj cannot be followed: between attention and it"):
            lvlm.run(sample, [probe])
        lvlm = ss.LVLM(lvlm.module, lvlm.processor, verify=False)
    with pytest.raises(ValueError, match=SAYS[llm]):
        lvlm.run(sample, [probe])
    lvlm.run(sample, [ss.ValueNorms(), ss.TokenNorms(site="attn_out")])


@pytest.mark.parametrize("how", ["lora", "8 bit"])
def test_writes_at_decode_steps_are_those_of_a_longer_prompt(how):
    """Heads of a few queries are pushed one by one; a prompt's pass asks for the whole matrix."""
    lvlm, sample = held(HELD[how])
    probe = ss.ContributionNorms({"image": "image", "text": "text"})
    answer = lvlm.generate(sample, [probe], max_new_tokens=3, min_new_tokens=3)
    ids = answer.sequences[:, :-1]
    inputs = {**sample.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    again = lvlm.run(lvlm.prepare(inputs=inputs), [probe])[probe]
    grown = again.norms[:, :, -2:]
    for step in (1, 2):
        got = answer.steps[step][probe]
        assert relative(got.norms[:, :, 0, 0], grown[:, :, step - 1, 0]) < 1e-5
        assert relative(got.per_head[..., 0, 0], again.per_head[..., step - 3, 0]) < 1e-5


def test_edits_of_what_is_added_are_no_misfit():
    """Contributions are what attention writes; an edit behind it does not belong to them."""
    lvlm, sample = held(HELD["lora"])
    probe = ss.ContributionNorms({"all": "all"})
    edit = ss.AblateActivations([0, 1], "all", site="attn_out", layers=[0])
    plain, edited = lvlm.run(sample, [probe]), lvlm.run(sample, [probe], [edit])
    assert torch.equal(plain[probe].norms[:, 0], edited[probe].norms[:, 0])
