"""Which ViT tokens make an image token is measured: right for any order, newlines, pools and a class of its own."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_families import build, inputs_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sinkscope as ss
from sinkscope.errors import InputError
from sinkscope.models.patch_map import destinations
from sinkscope.testing import random_image, tiny_llava, tiny_qwen2_5_vl
from sinkscope.testing.tiny import randomize
from tests.models.test_holding import Linear8

IMAGE, WIDTH = 3, 32


class Shuffled(nn.Module):
    """A projector that also permutes its tokens, in another way for every number of them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return out.index_select(-2, shuffle(out.shape[-2]))


def shuffle(count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (140, 84)])
@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen2_5_vl])
def test_a_hidden_permutation_is_followed(make, size):
    """The maps of a model and of its twin whose projector permutes tokens differ by that permutation."""
    module, processor = make()
    plain = ss.LVLM(module, processor, verify=False)
    straight = plain.prepare(images=random_image(*size), text="what").tokens
    owner = module.model.visual if hasattr(module.model, "visual") else module.model
    name = "merger" if hasattr(owner, "merger") else "multi_modal_projector"
    setattr(owner, name, Shuffled(getattr(owner, name)))
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(*size), text="what")
    visual = sample.tokens.select("image")
    order = shuffle(int(visual.sum()))
    if name == "merger":  # which sees the windows' order, and is put back behind it
        window = straight.vision.layout[0, straight.sources[visual][:, 0]] // 4
        order = window.argsort()[order[window]]
    assert not torch.equal(order, torch.arange(len(order)))
    assert torch.equal(sample.tokens.sources[visual], straight.sources[visual][order])
    assert torch.equal(sample.tokens.box[visual], straight.box[visual][order])
    boxes = (tokens.vision.box for tokens in (sample.tokens, straight))
    assert torch.allclose(*boxes, equal_nan=True)


def test_a_vit_token_that_feeds_several_image_tokens():
    """By hand: five outputs of six inputs."""
    reads = torch.tensor([[0, 1], [1, 2], [5, 5], [3, 3], [3, 3]])
    x = torch.randn(6, 4, requires_grad=True)
    out = x[reads].sum(1)
    (found,) = destinations(out, [x])
    assert found.tolist() == [0, -2, 1, -2, -1, 2]


class SeeingConfig(PretrainedConfig):
    """Of a class that transformers does not have."""

    model_type = "own_seeing_model"

    def __init__(self, **kwargs):
        sizes = dict(hidden_size=WIDTH, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
        self.text_config = LlamaConfig(**sizes, num_hidden_layers=2, intermediate_size=48)
        self.image_token_id = IMAGE
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self.text_config


class Look(nn.Module):
    """Attention of a vision block of our own."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa", num_attention_heads=2)
        self.q, self.k, self.v, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.num_heads, self.head_dim, self.scaling, self.is_causal = 2, 16, 0.25, False

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = attend(self, q, k, v, None, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.out_proj(out.flatten(2))


class Stage(nn.Module):
    """A vision block of our own."""

    def __init__(self):
        super().__init__()
        self.norm, self.look, self.think = nn.LayerNorm(WIDTH), Look(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.look(self.norm(x))
        return x + self.think(x.tanh())


class Eye(nn.Module):
    """Patches of 4 pixels, a token in front of them, and blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.stages = nn.ModuleList(Stage() for _ in range(3))

    def forward(self, pixels):
        x = self.embed(pixels)
        self.side = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        for stage in self.stages[:2]:  # the last one is not used
            x = stage(x)
        return x


class SeeingModel(PreTrainedModel):
    """Pools 2 x 2 patches, writes the rows of the image from right to left, and ends each with a newline."""

    config_class = SeeingConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.watcher = Eye()
        self.bridge = nn.Linear(WIDTH, WIDTH)
        self.newline = nn.Parameter(torch.zeros(WIDTH))
        self.lm = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_decoder(self):
        return self.lm.model

    def get_input_embeddings(self):
        return self.lm.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm.lm_head

    def get_encoder(self, modality=None):
        return self.watcher

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            x = self.watcher(pixel_values)[:, 1:].transpose(1, 2).unflatten(2, self.watcher.side)
            x = self.bridge(nn.functional.avg_pool2d(x, 2).flip(-1).permute(0, 2, 3, 1))
            ends = self.newline.expand(*x.shape[:2], 1, -1)
            seen = torch.cat([x, ends], dim=2).reshape(-1, WIDTH)
            embeds = embeds.masked_scatter((input_ids == IMAGE)[..., None], seen)
        out = self.lm(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        return CausalLMOutputWithPast(logits=out.logits, past_key_values=out.past_key_values)


def picture_of(rows, columns):
    """A picture of so many image tokens, and words around them."""
    count = rows * (columns + 1)
    pixels = torch.randn(1, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 10, *[IMAGE] * count, 11, 12]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture(scope="module")
def own():
    torch.manual_seed(0)
    model = SeeingModel(SeeingConfig()).eval()
    randomize(model, torch.Generator().manual_seed(0), 0.3)
    return ss.LVLM(model)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 4), (4, 1)])
def test_a_model_class_that_transformers_does_not_have(own, rows, columns):
    """No hint: blocks, the unused last one, CLS, pool, order, newlines and boxes are found."""
    sample = own.prepare(inputs=picture_of(rows, columns))
    tokens, anatomy = sample.tokens, own.anatomy
    assert (anatomy.feeds, anatomy.drops, anatomy.prefix, anatomy.merge) == ((1,), 1, ("cls",), 2)
    assert anatomy.projector == "bridge"
    at = tokens.select("image")[0].nonzero().flatten().view(rows, columns + 1)
    assert tokens.select("newline")[0].nonzero().flatten().tolist() == at[:, -1].tolist()
    assert not tokens.select("patch")[0, at[:, -1]].any()
    for row in range(rows):
        for column in range(columns):
            place = at[row, columns - 1 - column]
            first = 1 + 2 * row * 2 * columns + 2 * column
            wanted = [first, first + 1, first + 2 * columns, first + 2 * columns + 1]
            assert tokens.sources[0, place].tolist() == wanted
            assert tokens.box[0, place].tolist() == [
                8 * column,
                8 * row,
                8 * column + 8,
                8 * row + 8,
            ]
            assert (tokens.row[0, place], tokens.column[0, place]) == (row, column)


def note(seen, layer, module, args):
    seen[layer] = module, args[0]


def test_probes_and_edits_of_that_class_are_right(own):
    """Attention of both towers against the softmax by hand, and a mask against logits without the keys."""
    sample = own.prepare(inputs=picture_of(2, 3))
    seen, vision = {}, ss.AttentionMass({"cls": "cls"}, layers=[0, 1], tower="vision")
    mass = ss.AttentionMass({"image": "image"})
    for layer in (0, 1):
        look = own.module.watcher.stages[layer].look
        look.register_forward_pre_hook(partial(note, seen, layer))
    run = own.run(sample, [vision, mass])
    for layer, (look, x) in seen.items():
        q, k = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (look.q, look.k))
        by_hand = (q @ k.transpose(-1, -2) * 0.25).softmax(-1)[..., 0]
        assert torch.allclose(run[vision].mass[:, layer, ..., 0], by_hand, atol=1e-5)
    assert torch.equal(run.logits, own.module(**sample.inputs).logits)
    masked = own.run(sample, interventions=[ss.MaskKeys("image")]).logits
    assert float((masked - run.logits).abs().max()) > 1e-3
    check = ss.testing.check_model(own, sample)
    assert check.wrong == (), str(check)


def test_a_map_that_no_one_can_say_is_said(own):
    """Every image token of a resampler reads every patch: no map, and V-sinks are not carried."""
    model = own.module
    mixed = ss.LVLM(model, verify=False)
    bridge = model.bridge

    class Mixer(nn.Module):
        def forward(self, x):
            return bridge(x) + x.mean(dim=(1, 2), keepdim=True)

    model.bridge = Mixer()
    try:
        tokens = mixed.prepare(inputs=picture_of(2, 2)).tokens
    finally:
        model.bridge = bridge
    assert tokens.unmapped == "every image token is made of all ViT tokens"
    assert (tokens.sources == -1).all()
    assert tokens.select("image").sum() == 6
    with pytest.raises(ss.SinkscopeError, match="every image token is made of all ViT tokens"):
        tokens.from_vision(torch.zeros(tokens.vision.live.shape))


def test_inputs_that_the_model_refuses_are_explained(own):
    wrong = picture_of(2, 2)
    wrong["pixel_values"] = wrong["pixel_values"][:, :2]
    with pytest.raises(InputError, match=r"does not take these inputs .*expected all that its own"):
        own.prepare(inputs=wrong)


def test_a_map_follows_the_shape_and_is_measured_once(own, monkeypatch):
    """Three shapes in turn: two measurements for the new ones, none for one that was seen."""
    count = len(own._maps.known)
    own.prepare(inputs=picture_of(5, 2))
    own.prepare(inputs=picture_of(2, 5))
    assert len(own._maps.known) == count + 2
    own.prepare(inputs=picture_of(5, 2))
    assert len(own._maps.known) == count + 2


def test_the_anatomy_is_data(own):
    assert dataclasses.replace(own.anatomy) == own.anatomy


def of_type(name, shape=0):
    model = build(name)
    lvlm = ss.LVLM(model)
    return lvlm, lvlm.prepare(inputs=inputs_of(name, model, shape))


def test_a_cls_token_at_the_end_is_live():
    """Llama 4 appends CLS: it takes part in attention, and no image token is made of it."""
    lvlm, sample = of_type("llama4")
    vision = sample.tokens.vision
    assert lvlm.anatomy.suffix == ("cls",)
    assert vision.live.all()
    assert vision.select("cls")[:, -1].all()
    assert int(vision.select("cls").sum()) == 1
    mass = ss.AttentionMass({"all": "all"}, tower="vision")
    assert torch.allclose(lvlm.run(sample, [mass])[mass].mass, torch.ones(1), atol=1e-5)


def test_two_images_of_a_resampler_have_no_map():
    """Every token reads all patches of its own image, and none of the other."""
    _, sample = of_type("aria", shape=2)
    assert sample.tokens.unmapped == "every image token is made of all ViT tokens"


def test_a_tower_that_runs_several_times_is_said():
    """Tiles and the whole image pass the tower one after the other: no map, and the decoder works."""
    lvlm, sample = of_type("deepseek_ocr2", shape=1)
    assert sample.tokens.unmapped == "the vision tower runs several times in a pass"
    image = sample.tokens.select("image")
    assert torch.equal(image, sample.tokens.ids == lvlm.anatomy.image_token_id)
    run = lvlm.run(sample, [probe := ss.AttentionMass({"image": "image"})])
    with torch.no_grad():
        assert torch.equal(run.logits, lvlm.module(**sample.inputs).logits)
    assert run[probe].mass.nan_to_num().max() <= 1 + 1e-5


def test_what_is_kept_knows_how_blocks_return(tmp_path, monkeypatch):
    """Blocks of Llama 4's tower return tuples: a second load runs the same passes without blocks."""
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path))
    monkeypatch.setenv("SINKSCOPE_KEEP_ANATOMY", "1")
    first, second = (of_type("llama4", shape=0)[1].tokens for _ in "12")
    assert torch.equal(first.sources, second.sources)


class Sorted(nn.Module):
    """A projector that puts its tokens in the order of their norms."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        order = x.norm(dim=-1).argsort(dim=-1)
        return out.gather(1, order[..., None].expand_as(out))


class Deaf(Sorted):
    """A projector through which no gradient goes, as kernels of quantised weights may be."""

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize(
    ("kind", "says"),
    [(Sorted, "changes with the image"), (Deaf, "no gradient passes")],
)
def test_a_map_that_cannot_be_trusted_is_refused(kind, says):
    """Of every image, also of one that comes later; the decoder works."""
    module, processor = tiny_llava()
    module.model.multi_modal_projector = kind(module.model.multi_modal_projector)
    lvlm = ss.LVLM(module, processor)
    for size in ((64, 64), (90, 40)):
        sample = lvlm.prepare(images=random_image(*size), text="what")
        assert says in sample.tokens.unmapped
        assert (sample.tokens.sources == -1).all()
        assert int(sample.tokens.select("image").sum()) == 16
    mass = ss.AttentionMass({"image": "image"})
    assert lvlm.run(sample, [mass])[mass].mass.nan_to_num().max() <= 1 + 1e-5


@pytest.mark.parametrize("how", ["bfloat16", "int8"])
@pytest.mark.parametrize("make", [tiny_llava, tiny_qwen2_5_vl])
def test_maps_are_the_same_in_half_precision_and_in_int8(make, how):
    module, processor = make()
    image = random_image(120, 60)
    want = ss.LVLM(module, processor).prepare(images=image, text="what").tokens.sources
    if how == "bfloat16":
        module.to(torch.bfloat16)
    else:
        owner = module.model.visual if hasattr(module.model, "visual") else module.model
        part = getattr(owner, "merger", None) or owner.multi_modal_projector
        for name, child in list(part.named_modules()):
            if isinstance(child, nn.Linear):
                where, _, leaf = name.rpartition(".")
                setattr(part.get_submodule(where), leaf, Linear8(child))
    got = ss.LVLM(module, processor).prepare(images=image, text="what").tokens.sources
    assert torch.equal(got, want)
