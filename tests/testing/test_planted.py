"""Planted truth, measured with nothing but transformers' own eager attention and hidden states."""

import dataclasses
import functools

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from sinkscope.testing import plant, random_image, random_plant, sink_free, write_checkpoint

LAYOUTS = ["clip", "siglip"]
SEEDS = range(8)
TEXTS = (
    "USER: <image>\nHow many red shapes are there? ASSISTANT:",
    "USER: <image>\nWhy? ASSISTANT:",
)
PATCH_KINDS = ("v_sinks", "l_sinks", "overlap", "spike_decoys", "attention_decoys")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Hundreds of small models: on a busy machine threads that wait for one another cost 50-fold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Tower:
    """What one tower showed: [batch layer pos] each; attention per block, states before each block.

    `received` is the mean over the queries that can see the key, over its value under uniform
    attention, and the largest of all heads.
    """

    received: torch.Tensor
    peak: torch.Tensor
    channel: torch.Tensor
    median: torch.Tensor
    rms: torch.Tensor
    masks: dict[str, torch.Tensor]
    ordinary: torch.Tensor

    def of(self, kind, values):
        """`values` at the tokens of `kind`: [token, layer]."""
        return values.transpose(1, 2)[self.masks[kind]]


def relative_received(patterns, visible):
    """[batch layer pos]: received attention over its null, the largest over heads."""
    seen = visible.sum(1).clamp(min=1)
    uniform = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    null = uniform.sum(1) / seen
    received = (torch.stack(patterns, 1) * visible[:, None, None]).sum(3) / seen[:, None, None]
    return (received / null.clamp(min=1e-9)[:, None, None]).amax(2)


def tower(patterns, hidden, live, visible, masks):
    states = torch.stack(hidden, 1)
    size = states.abs()
    median = torch.stack(
        [torch.stack([s[m].median() for s in b]) for b, m in zip(size, live, strict=True)]
    )
    planted = torch.stack([*masks.values()]).any(0)
    return Tower(
        relative_received(patterns, visible.float()),
        size.amax(-1),
        size.argmax(-1),
        median[..., None],
        states.square().mean(-1).sqrt(),
        masks,
        live & ~planted,
    )


def look(planted, inputs):
    """(ViT, LLM) as `Tower`s, from forward passes with eager attention."""
    model = planted.model
    model.set_attn_implementation("eager")
    show = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        vision = model.model.vision_tower(inputs["pixel_values"], **show)
        language = model(**inputs, **show)
    batch, positions = vision.hidden_states[0].shape[:2]
    everywhere = torch.ones(batch, positions, dtype=torch.bool)
    v_masks = {kind: planted.vision_tokens(kind).expand(batch, -1) for kind in PATCH_KINDS}
    v_visible = torch.ones(batch, positions, positions)
    live = inputs["attention_mask"].bool()
    causal = torch.ones(live.shape[1], live.shape[1]).tril().bool()
    visible = causal & live[:, :, None] & live[:, None, :]
    masks = {k: planted.tokens(k, inputs["input_ids"]) for k in (*PATCH_KINDS, "text_sinks")}
    return (
        tower(vision.attentions, vision.hidden_states, everywhere, v_visible, v_masks),
        tower(language.attentions, language.hidden_states[:-1], live, visible, masks),
    )


@functools.cache
def example(layout, seed):
    planted = random_plant(seed, layout, n_v=2, n_l=2, n_overlap=1)
    return planted.truth, *look(planted, planted.inputs(TEXTS, image_seed=100 * seed))


every_example = pytest.mark.parametrize(
    ("layout", "seed"), [(layout, seed) for layout in LAYOUTS for seed in SEEDS]
)


# --------------------------------------------------------------------------------- where and since when


@every_example
def test_vit_spikes_are_where_and_since_when_they_were_planted(layout, seed):
    truth, vit, _ = example(layout, seed)
    born = truth.v_layer + 1
    massive = (vit.peak > 100) & (vit.peak >= 1000 * vit.median)
    spiking = vit.masks["v_sinks"] | vit.masks["spike_decoys"]
    assert not massive[:, :born].any()
    assert torch.equal(massive[:, born:], spiking[:, None].expand_as(massive[:, born:]))
    assert (vit.of("v_sinks", vit.channel)[:, born:] == truth.v_dims[0]).all()
    assert (vit.of("spike_decoys", vit.channel)[:, born:] == truth.v_decoy_dim).all()
    assert vit.peak[:, :born].max() < 10
    assert vit.peak.transpose(1, 2)[vit.ordinary].max() < 10


@every_example
def test_llm_spikes_are_where_and_since_when_they_were_planted(layout, seed):
    truth, _, llm = example(layout, seed)
    born = truth.l_layer + 1
    massive = (llm.peak > 100) & (llm.peak >= 1000 * llm.median)
    kinds = ("l_sinks", "overlap", "text_sinks", "spike_decoys")
    spiking = torch.stack([llm.masks[kind] for kind in kinds]).any(0)
    assert not massive[:, :born].any()
    assert torch.equal(massive[:, born:], spiking[:, None].expand_as(massive[:, born:]))
    assert (llm.of("l_sinks", llm.channel)[:, born:] == truth.l_dims[0]).all()
    assert (llm.of("overlap", llm.channel)[:, born:] == truth.l_dims[0]).all()
    assert (llm.of("text_sinks", llm.channel)[:, born:] == truth.l_dims[1]).all()
    assert (llm.of("spike_decoys", llm.channel)[:, born:] == truth.l_decoy_dim).all()


@every_example
def test_v_sinks_arrive_large_in_other_dims_and_not_massive(layout, seed):
    truth, _, llm = example(layout, seed)
    assert not set(truth.arrival_dims) & set(truth.l_dims)
    arrived = llm.of("v_sinks", llm.channel)[:, 0]
    assert torch.isin(arrived, torch.tensor(truth.arrival_dims)).all()
    assert (llm.of("v_sinks", llm.peak)[:, 0] > 10).all()
    assert (llm.of("v_sinks", llm.peak)[:, 0] < 100).all()
    others = llm.peak.transpose(1, 2)[llm.ordinary][:, 0]
    assert others.max() < 5


# ------------------------------------------------------------------------------------------- attention


@every_example
def test_vit_attention_sinks_only_where_planted(layout, seed):
    truth, vit, _ = example(layout, seed)
    born = truth.v_layer + 1
    v_sinks = vit.of("v_sinks", vit.received)
    # An attention that writes the spike lets the V-sinks attend to one another, so each may get all n queries.
    own = len(truth.v_sinks) + 0.1 if truth.v_written_by == "attention" else 2
    assert v_sinks[:, : truth.v_layer].numel() == 0 or v_sinks[:, : truth.v_layer].max() < 2
    assert v_sinks[:, truth.v_layer].max() < own
    assert v_sinks[:, born:].min() > 5
    assert vit.of("attention_decoys", vit.received).min() > 5
    assert vit.of("attention_decoys", vit.peak).max() < 10
    assert vit.of("spike_decoys", vit.received).max() < 2
    assert vit.received.transpose(1, 2)[vit.ordinary].max() < 2


@every_example
def test_llm_attention_sinks_only_where_planted(layout, seed):
    truth, _, llm = example(layout, seed)
    born = truth.l_layer + 1
    assert llm.of("v_sinks", llm.received).min() > 5  # overlap included, from block 0 on
    for kind in ("l_sinks", "text_sinks"):
        assert llm.of(kind, llm.received)[:, :born].max() < 2
        assert llm.of(kind, llm.received)[:, born:].min() > 5
    assert llm.of("attention_decoys", llm.received).min() > 5
    assert llm.of("attention_decoys", llm.peak).max() < 10
    assert llm.of("spike_decoys", llm.received).max() < 2
    assert llm.received.transpose(1, 2)[llm.ordinary].max() < 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(8))
def test_sink_free_models_have_none(layout, seed):
    planted = sink_free(layout, seed)
    for seen in look(planted, planted.inputs(TEXTS, image_seed=seed)):
        assert not any(mask.any() for mask in seen.masks.values())
        assert seen.peak.max() < 10
        assert seen.received.transpose(1, 2)[seen.ordinary].max() < 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", ["mlp", "attention"])
def test_the_named_sub_module_wrote_the_spike(layout, writer):
    planted = plant(layout, v_written_by=writer, v_layer=2)
    truth, inputs, written = planted.truth, planted.inputs(TEXTS), {}
    block = planted.model.model.vision_tower.encoder.layers[truth.v_layer]
    decoder = planted.model.model.language_model.layers[truth.l_layer]
    for name, module in (
        ("attention", block.self_attn.out_proj),
        ("mlp", block.mlp),
        ("llm attention", decoder.self_attn.o_proj),
        ("llm mlp", decoder.mlp),
    ):
        module.register_forward_hook(
            lambda module, args, output, name=name: written.update({name: output.abs().amax(-1)})
        )
    with torch.no_grad():
        planted.model(**inputs)
    sinks = planted.vision_tokens("v_sinks")
    assert written[writer][:, sinks].min() > 300
    assert written[writer][:, ~sinks].max() < 10
    assert written[{"mlp": "attention", "attention": "mlp"}[writer]].max() < 10
    l_sinks = planted.tokens("l_sinks", inputs["input_ids"])
    assert truth.l_written_by == "mlp"
    assert written["llm mlp"][l_sinks].min() > 300
    assert written["llm attention"].max() < 10


# --------------------------------------------------------------------------- strength, images, prompts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strength_scales_spike_and_attention_down_to_nothing(layout):
    spikes, pulls = [], []
    for strength in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
        planted = plant(layout, strength=strength)
        vit, llm = look(planted, planted.inputs())
        spikes.append(
            [vit.of("v_sinks", vit.peak)[:, -1].min(), llm.of("l_sinks", llm.peak)[:, -1].min()]
        )
        pulls.append(
            [
                vit.of("v_sinks", vit.received)[:, -1].min(),
                llm.of("l_sinks", llm.received)[:, -1].min(),
            ]
        )
    spikes, pulls = torch.tensor(spikes), torch.tensor(pulls)
    assert (spikes.diff(dim=0) > 0).all()
    assert (pulls.diff(dim=0) > 0).all()
    assert (spikes[0] < 5).all()
    assert (pulls[0] < 1.5).all()
    assert (spikes[1] < 100).all()  # at 0.1 both published criteria miss them,
    assert (pulls[1] < 5).all()
    assert (spikes[3] > 100).all()  # at 0.5 they find them
    assert (pulls[3] > 5).all()


IMAGES = {
    "black": Image.new("RGB", (64, 64)),
    "white": Image.new("RGB", (64, 64), (255, 255, 255)),
    "red": Image.new("RGB", (120, 40), (255, 0, 0)),
    "small": random_image(9, 13, seed=5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", ["mlp", "attention"])
@pytest.mark.parametrize("name", sorted(IMAGES))
def test_any_image_shows_the_same_sinks(layout, writer, name):
    planted = plant(
        layout, v_written_by=writer, l_sinks=(20, 46), spike_decoys=(3,), attention_decoys=(50,)
    )
    inputs = planted.processor(images=IMAGES[name], text=TEXTS[0], return_tensors="pt")
    vit, llm = look(planted, inputs)
    massive = (vit.peak > 100) & (vit.peak >= 1000 * vit.median)
    assert massive[0, -1].nonzero().flatten().tolist() == [
        patch + planted.truth.cls_tokens for patch in (3, 9, 46)
    ]
    massive = (llm.peak > 100) & (llm.peak >= 1000 * llm.median)
    start = int(llm.masks["spike_decoys"][0].nonzero()[0]) - 3
    assert massive[0, -1].nonzero().flatten().tolist() == [0, *(start + p for p in (3, 20, 46))]
    assert vit.of("v_sinks", vit.received)[:, -1].min() > 5
    assert llm.of("l_sinks", llm.received)[:, -1].min() > 5
    assert llm.of("v_sinks", llm.received).min() > 5
    assert max(seen.received.transpose(1, 2)[seen.ordinary].max() for seen in (vit, llm)) < 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_of_any_length_show_the_same_sinks(layout):
    planted = plant(layout, l_sinks=(20, 63))
    texts = [
        "<image> Why?",
        "USER: <image>\n" + "How many red shapes are there? " * 30 + "ASSISTANT:",
    ]
    inputs = planted.inputs(texts)
    _, llm = look(planted, inputs)
    massive = (llm.peak > 100) & (llm.peak >= 1000 * llm.median)
    expected = llm.masks["l_sinks"] | llm.masks["text_sinks"]
    assert expected.sum(dim=1).tolist() == [3, 3]
    assert torch.equal(massive[:, -1], expected)
    assert llm.of("l_sinks", llm.received)[:, -1].min() > 2
    assert llm.of("l_sinks", llm.received)[2:, -1].min() > 5


def test_token_masks_count_patches_in_every_image_and_row():
    planted = plant(v_sinks=(0,), l_sinks=(63,))
    image, pad, bos = planted.processor.image_token_id, 3, 1
    row = [pad, bos, 9, *[image] * 64, 8, *[image] * 64, 7]
    ids = torch.tensor([row])
    assert planted.tokens("v_sinks", ids).nonzero()[:, 1].tolist() == [3, 68]
    assert planted.tokens("l_sinks", ids).nonzero()[:, 1].tolist() == [66, 131]
    assert planted.tokens("text_sinks", ids).nonzero()[:, 1].tolist() == [1]
    assert planted.tokens("image", ids).sum() == 128
    assert planted.vision_tokens("l_sinks").nonzero()[:, 0].tolist() == [64]
    assert plant("siglip", v_sinks=(0,)).vision_tokens("v_sinks").nonzero()[:, 0].tolist() == [0]
    assert not plant(text_sinks=False).tokens("text_sinks", ids).any()


def test_an_overlap_is_a_v_sink_and_no_l_sink():
    truth = plant(v_sinks=(9, 46), l_sinks=(46, 20)).truth
    assert (truth.v_sinks, truth.l_sinks, truth.overlap) == ((9, 46), (20,), (46,))


def test_the_published_rms_threshold_needs_a_wide_model():
    for width, finds in ((128, False), (512, True)):
        planted = plant(d_model=width)
        _, llm = look(planted, planted.inputs())
        score = llm.of("l_sinks", llm.peak / llm.rms)[:, -1]
        assert (score <= width**0.5).all()
        assert bool((score > 20).all()) is finds


def test_a_single_llm_dim_is_shared_with_bos():
    planted = plant(l_dims=(7,))
    _, llm = look(planted, planted.inputs())
    for kind in ("l_sinks", "text_sinks"):
        assert (llm.of(kind, llm.channel)[:, -1] == 7).all()
        assert llm.of(kind, llm.received)[:, -1].min() > 5


def test_named_heads_attend_to_their_sinks():
    planted = plant(attention_decoys=(50,))
    planted.model.set_attn_implementation("eager")
    inputs, truth = planted.inputs(), planted.truth
    with torch.no_grad():
        vision = planted.model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
        language = planted.model(**inputs, output_attentions=True)
    to_v = vision.attentions[-1][0, truth.v_head][:, planted.vision_tokens("v_sinks")].sum(-1)
    assert to_v.min() > 0.9
    last = language.attentions[-1][0, :, -1]
    for head, kinds in (
        (truth.l_head, ("l_sinks", "text_sinks")),
        (truth.bos_head, ("text_sinks",)),
        (truth.arrival_head, ("v_sinks",)),
    ):
        mask = torch.stack([planted.tokens(kind, inputs["input_ids"])[0] for kind in kinds]).any(0)
        assert last[head, mask].sum() > 0.9


# ------------------------------------------------------------------------------------ the whole object


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_is_in_the_weights(layout, tmp_path):
    planted = random_plant(0, layout)
    write_checkpoint(planted.model, planted.processor, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = planted.inputs(TEXTS)
    with torch.no_grad():
        logits = planted.model(**inputs).logits
        assert torch.equal(logits, loaded(**inputs).logits)
        planted.model.set_attn_implementation("eager")
        eager = planted.model(**inputs).logits
    live = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[live], eager[live], atol=1e-4, rtol=1e-4)
    ids = planted.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2


def test_bfloat16_shows_the_same_sinks():
    planted = plant()
    planted.model.to(torch.bfloat16)
    inputs = planted.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    vit, llm = look(planted, inputs)
    assert vit.of("v_sinks", vit.peak)[:, -1].min() > 100
    assert llm.of("l_sinks", llm.received.float())[:, -1].min() > 5


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, same, other = random_plant(3), random_plant(3), random_plant(4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.truth == same.truth
    assert one.truth != other.truth
    pairs = zip(one.model.parameters(), same.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "dino"}, "layout='dino'; expected one of .'clip', 'siglip'."),
        ({"v_written_by": "norm"}, "v_written_by='norm'; expected one of .'mlp', 'attention'."),
        ({"strength": 1.5}, "strength=1.5; expected a number from 0"),
        ({"d_model": 100}, "d_model=100; expected a multiple of 128"),
        ({"v_sinks": (64,)}, r"v_sinks=\(64,\); expected distinct patches in 0..63"),
        ({"l_sinks": (2, 2)}, r"l_sinks=\(2, 2\); expected distinct patches"),
        ({"spike_decoys": (9,)}, r"decoys at \[9\]; expected neither a sink nor the other kind"),
        (
            {"spike_decoys": (1,), "attention_decoys": (1,)},
            "neither a sink nor the other kind of decoy there",
        ),
        ({"v_layer": 4}, "v_layer=4; expected an int from 0 to 3"),
        ({"l_layer": -1}, "l_layer=-1; expected an int from 0 to 4"),
        ({"v_dims": (128,)}, r"v_dims=\(128,\); expected 1 to 8 distinct channels in 0..127"),
        ({"l_dims": (3, 3)}, "expected 1 to 8 distinct channels"),
        ({"l_dims": ()}, "expected 1 to 8 distinct channels"),
    ],
)
def test_plant_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plant(**arguments)


def test_random_plant_refuses_more_patches_than_there_are():
    with pytest.raises(ValueError, match="counts of 0 or more, 64 in all"):
        random_plant(0, n_v=60, n_l=5)


def test_unknown_kinds_are_refused():
    planted = plant()
    with pytest.raises(ValueError, match=r"kind='sinks'; expected one of .'v_sinks'"):
        planted.vision_tokens("sinks")
