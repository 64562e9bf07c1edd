"""What groups and keys write is what arrives in the stream: by hand from eager attention."""

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY, random_image, tiny_llava
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
    states = ss.ResidualStates(tower=c.tower, site="attn_out")
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
