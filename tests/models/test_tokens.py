"""The map from pixels to ViT tokens to LLM positions, proven by disturbing one thing at a time."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import SelectionError
from sinkscope.testing import random_image, tiny_llava
from sinkscope.tokens import KINDS
from tests.models.surgery import (
    changed,
    inverted,
    llm_states,
    llm_states_after_disturbing,
    vit_states,
)

# Sizes at which the image processor moves no pixel but crops: the map must be exact.
EXACT = {
    "llava-clip-llama": [(32, 32), (56, 32), (32, 48), (33, 32)],
    "llava-siglip-qwen2": [(32, 32)],
    "qwen2.5-vl": [(112, 56), (56, 84), (84, 84)],
    "gemma3": [(48, 48)],
}
CASES = [(family, size) for family, sizes in EXACT.items() for size in sizes]
BATCH = {
    "llava-clip-llama": [(32, 32), (56, 32), (32, 48)],
    "llava-siglip-qwen2": [(32, 32), (32, 32), (32, 32)],
    "qwen2.5-vl": [(84, 56), (56, 84), (84, 84)],
    "gemma3": [(48, 48), (48, 48), (48, 48)],
}
TEXTS = ["what", "how many red shapes are there ?"]


def image_positions(sample):
    return (sample.tokens.image >= 0).nonzero().tolist()


def mixed_batch(tiny, family):
    """The model and a left-padded batch: one image in the first row, two in the second."""
    images = [random_image(*size, seed) for seed, size in enumerate(BATCH[family])]
    rows = [images[:1], images[1:]]
    return tiny(family), tiny(family).prepare(images=rows, text=TEXTS), rows


@pytest.mark.parametrize(("family", "size"), CASES)
def test_pixels_of_a_box_reach_the_sources_of_its_token_and_nothing_else(tiny, family, size):
    lvlm = tiny(family)
    image = random_image(*size, seed=1)
    sample = lvlm.prepare(images=image, text="what is it")
    before = vit_states(lvlm, sample)
    assert sample.tokens.box_unit == "original"
    for row, position in image_positions(sample):
        box = sample.tokens.box[row, position].tolist()
        after = vit_states(lvlm, lvlm.prepare(images=inverted(image, box), text="what is it"))
        sources = sample.tokens.sources[row, position].tolist()
        assert changed(before, after) == {(0, source) for source in sources}


@pytest.mark.parametrize(("family", "size"), CASES)
def test_the_pixel_box_of_a_vit_token_is_its_own(tiny, family, size):
    lvlm = tiny(family)
    image = random_image(*size, seed=2)
    sample = lvlm.prepare(images=image, text="what is it")
    vision = sample.tokens.vision
    before = vit_states(lvlm, sample)
    for token in vision.select("patch")[0].nonzero().flatten().tolist():
        x0, y0, x1, y1 = vision.box[0, token].tolist()
        x, y = (x0, y0) if token % 2 else (x1 - 1, y1 - 1)
        pixel = inverted(image, (x, y, x + 1, y + 1))
        after = vit_states(lvlm, lvlm.prepare(images=pixel, text="what is it"))
        assert changed(before, after) == {(0, token)}


@pytest.mark.parametrize(
    "family", ["llava-clip-llama", "llava-siglip-qwen2", "qwen2.5-vl", "gemma3"]
)
@pytest.mark.parametrize("size", [(150, 90), (70, 130)])
def test_resized_images_change_most_where_the_map_says(tiny, family, size):
    """Resizing blurs a block into its neighbours, but its own token feels it most."""
    lvlm = tiny(family)
    image = random_image(*size, seed=3)
    sample = lvlm.prepare(images=image, text="what is it")
    before = vit_states(lvlm, sample)
    for row, position in image_positions(sample)[::3]:
        box = sample.tokens.box[row, position].tolist()
        after = vit_states(lvlm, lvlm.prepare(images=inverted(image, box), text="what is it"))
        sources = [s for s in sample.tokens.sources[row, position].tolist() if s >= 0]
        moved = (after - before).norm(dim=-1)[0]
        assert set(moved.topk(len(sources)).indices.tolist()) == set(sources)


@pytest.mark.parametrize("family", list(EXACT))
def test_pixels_in_a_batch_reach_only_their_own_image(tiny, family):
    """Two images in a row, another row, padding: every image has its own tokens."""
    lvlm, sample, rows = mixed_batch(tiny, family)
    before = vit_states(lvlm, sample)
    assert not sample.tokens.live[0, 0]
    for row, position in image_positions(sample)[::5]:
        image = int(sample.tokens.image[row, position])
        box = sample.tokens.box[row, position].tolist()
        edited = [list(images) for images in rows]
        edited[row][image] = inverted(rows[row][image], box)
        after = vit_states(lvlm, lvlm.prepare(images=edited, text=TEXTS))
        index = int(sample.tokens.image_index[row, position])
        sources = sample.tokens.sources[row, position].tolist()
        live = sample.tokens.vision.live
        assert {p for p in changed(before, after) if live[p]} == {(index, s) for s in sources}


@pytest.mark.parametrize("family", list(EXACT))
def test_a_vit_token_reaches_exactly_the_position_the_map_says(tiny, family):
    """ViT tokens of every image of a padded batch, disturbed where they enter the projector."""
    lvlm, sample, _ = mixed_batch(tiny, family)
    tokens, vision = sample.tokens, sample.tokens.vision
    before = llm_states(lvlm, sample)
    for image, token in (
        vision.select("patch").nonzero().tolist()[:: 3 if family == "qwen2.5-vl" else 1]
    ):
        after = llm_states_after_disturbing(lvlm, sample, image, token)
        fed = (tokens.image_index == image) & (tokens.sources == token).any(dim=-1)
        assert fed.sum() == 1
        assert changed(before, after) == {tuple(place) for place in fed.nonzero().tolist()}


@pytest.mark.parametrize(
    ("tower", "strategy", "extra", "positions", "first"),
    [("clip", "full", 1, 17, 0), ("siglip", "default", 0, 15, 1), ("clip", "default", 1, 16, 1)],
)
def test_every_feature_strategy_of_llava(tower, strategy, extra, positions, first):
    """CLIP may keep its CLS, and a tower without CLS then loses its first patch."""
    module, processor = tiny_llava(tower)
    module.config.vision_feature_select_strategy = strategy
    processor.vision_feature_select_strategy = strategy
    processor.num_additional_image_tokens = extra
    lvlm = ss.LVLM(module, processor)
    sample = lvlm.prepare(images=random_image(32, 32), text="what")
    tokens = sample.tokens
    assert tokens.select("image").sum() == positions
    before = llm_states(lvlm, sample)
    for token in range(first, int(tokens.vision.live.sum())):
        after = llm_states_after_disturbing(lvlm, sample, 0, token)
        fed = (tokens.sources == token).any(dim=-1)
        assert changed(before, after) == {tuple(place) for place in fed.nonzero().tolist()}
    start = int(tokens.select("image")[0].int().argmax())
    if first == 0:  # the CLS token has no cell and no box
        assert tokens.row[0, start] == -1
        assert tokens.box[0, start].isnan().all()
        assert tokens.row[0, start + 1] == 0
    assert (tokens.row[0, start + 1], tokens.column[0, start + 1]) == (
        0,
        {0: 0, 1: 2 - extra}[first],
    )


def test_boxes_of_a_centre_crop_by_hand(tiny):
    """56 x 32 pixels, cropped to 32 x 32: 12 columns are cut on the left; patches are 8 pixels."""
    sample = tiny("llava-clip-llama").prepare(images=random_image(56, 32), text="what")
    tokens = sample.tokens
    boxes = tokens.box[tokens.image >= 0]
    assert boxes[0].tolist() == [12, 0, 20, 8]
    assert boxes[-1].tolist() == [36, 24, 44, 32]
    assert tokens.vision.grid.tolist() == [[4, 4]]
    cells = [
        (int(r), int(c)) for r, c in zip(tokens.row[0], tokens.column[0], strict=True) if r >= 0
    ]
    assert cells == [(r, c) for r in range(4) for c in range(4)]


def test_boxes_of_a_merged_grid_by_hand(tiny):
    """112 x 84 pixels: 8 x 6 patches of 14, merged 2 x 2 into 4 x 3 tokens of 28 pixels."""
    sample = tiny("qwen2.5-vl").prepare(images=random_image(112, 84), text="what")
    tokens = sample.tokens
    visual = tokens.image >= 0
    assert tokens.vision.grid.tolist() == [[6, 8]]
    assert tokens.box[visual][1].tolist() == [28, 0, 56, 28]
    assert tokens.box[visual][-1].tolist() == [84, 56, 112, 84]
    assert tokens.sources[visual][0].tolist() == [0, 1, 2, 3]
    cells = list(zip(tokens.row[visual].tolist(), tokens.column[visual].tolist(), strict=True))
    assert cells == [(r, c) for r in range(3) for c in range(4)]
    of_first = tokens.vision.box[0, :4].tolist()
    assert of_first == [[0, 0, 14, 14], [14, 0, 28, 14], [0, 14, 14, 28], [14, 14, 28, 28]]


@pytest.mark.parametrize("family", list(EXACT))
def test_windows_permute_the_packed_sequence(tiny, family):
    """The layout is a permutation of the packed sequence, and no identity where there are windows."""
    lvlm, sample, _ = mixed_batch(tiny, family)
    vision = sample.tokens.vision
    if not lvlm.anatomy.vision.packed:
        assert vision.layout is None
        return
    places = vision.layout[vision.live]
    assert sorted(places.tolist()) == list(range(int(vision.live.sum())))
    assert places.tolist() != list(range(len(places)))
    assert (vision.layout[~vision.live] == -1).all()


@pytest.mark.parametrize("family", list(EXACT))
def test_ready_inputs_give_the_same_map_in_input_pixels(tiny, family):
    lvlm, sample, _ = mixed_batch(tiny, family)
    ready = lvlm.prepare(inputs=sample.inputs).tokens
    assert ready.box_unit == "input"
    for name in ("ids", "live", "kind", "image", "image_index", "row", "column", "sources"):
        assert torch.equal(getattr(ready, name), getattr(sample.tokens, name)), name
    assert ready.box[ready.image >= 0].min() == 0
    side = {"qwen2.5-vl": 28.0, "gemma3": 16.0}.get(family, 8.0)
    sizes = ready.box[ready.image >= 0]
    assert set((sizes[:, 2] - sizes[:, 0]).tolist()) == {side}


def test_selections_by_name(tiny):
    lvlm, sample, _ = mixed_batch(tiny, "llava-clip-llama")
    tokens = sample.tokens
    assert tokens.names == (
        "all",
        "bos",
        "first",
        "text",
        "special",
        "image",
        "last",
        "image:0",
        "image:1",
        "patch",
    )
    assert torch.equal(tokens.select("patch"), tokens.select("image"))
    bos = lvlm.tokenizer.bos_token_id
    assert torch.equal(tokens.select("bos"), (tokens.ids == bos) & tokens.live)
    assert torch.equal(tokens.select("first"), tokens.select("bos"))
    assert torch.equal(tokens.select("image"), tokens.ids == lvlm.anatomy.image_token_id)
    assert tokens.select("image:1").sum(1).tolist() == [0, 16]
    assert torch.equal(tokens.select("image:0") | tokens.select("image:1"), tokens.select("image"))
    assert torch.equal(tokens.select("all"), sample.inputs["attention_mask"].bool())
    assert tokens.select("last").nonzero()[:, 1].tolist() == [tokens.ids.shape[1] - 1] * 2
    parts = torch.stack([tokens.select(k) for k in ("bos", "text", "special", "image")])
    assert torch.equal(parts.sum(0), tokens.live.long())
    mask = torch.ones_like(tokens.live)
    assert torch.equal(tokens.select(mask), tokens.live)
    by_layer = mask[:, None].expand(-1, 3, -1)
    assert torch.equal(tokens.select(by_layer, 3), tokens.live[:, None].expand(-1, 3, -1))


def test_a_model_without_bos_has_a_first_token_and_an_empty_bos(tiny):
    _, sample, _ = mixed_batch(tiny, "qwen2.5-vl")
    tokens = sample.tokens
    assert not tokens.select("bos").any()
    assert tokens.select("first").sum(1).tolist() == [1, 1]
    assert [tokens.words[b][int(p)] for b, p in enumerate(tokens.first)] == ["<|im_start|>"] * 2


@pytest.fixture(scope="module")
def padded(tiny):
    """A model and a left-padded batch of two rows."""
    images = [[random_image(32, 32, seed)] for seed in range(2)]
    texts = ["how many red shapes", "see many red red shapes 中 are there"]
    sample = tiny("llava-clip-llama").prepare(images=images, text=texts)
    assert not sample.tokens.live[0].all()
    return tiny("llava-clip-llama"), sample


def chosen(tokens, selection):
    """The words of every row's selected tokens, in order."""
    mask = tokens.select(selection)
    return [[tokens.words[b][p] for p in row.nonzero().flatten()] for b, row in enumerate(mask)]


def test_words_of_the_prompt_are_a_selection(padded):
    """Whole words in all places, across tokens; names go first, and only text is searched."""
    _, sample = padded
    tokens = sample.tokens
    assert chosen(tokens, "red") == [[" red"], [" red", " red"]]
    assert chosen(tokens, "many red") == 2 * [[" many", " red"]]
    assert chosen(tokens, " red") == chosen(tokens, "red")
    assert chosen(tokens, "shapes") == 2 * [[" shapes"]]
    assert tokens.select("image").sum(1).tolist() == [16, 16]
    for text, rows in (("are there", "[0]"), ("how", "[1]"), ("中", "[0]")):
        with pytest.raises(
            SelectionError, match=f"the text of rows \\{rows} does not hold; expected"
        ):
            tokens.select(text)
    for text in ("imag", "USERS", "<image>", "", " ", "ed sha", "re", "hape"):
        with pytest.raises(SelectionError, match=r"expected one of .*no such whole words: write"):
            tokens.select(text)
    with pytest.raises(SelectionError, match="is unknown without a tokenizer"):
        replace(tokens, words=None).select("red")


@pytest.mark.parametrize(
    ("typo", "meant"), [("imag", "image"), ("imge", "image"), ("tex", "text"), ("las", "last")]
)
def test_a_typo_of_a_name_that_is_a_part_of_a_word_is_refused(padded, typo, meant):
    """It stands inside a word of every row, and selects nothing; as a word of its own it does."""
    tokens = padded[1].tokens
    inside = [["see ", f"a{typo}", "e ", f" {typo}s"], ["see ", typo[:2], f"{typo[2:]}4", "?"]]
    with pytest.raises(SelectionError, match=f"Got the selection '{typo}'.*Did you mean '{meant}'"):
        ending_in(tokens, inside).select(typo)
    alone = [["see ", typo[:2], typo[2:], "!"], ["(", typo, ")", f"{typo}s"]]
    mask = ending_in(tokens, alone).select(typo)
    assert mask[:, -4:].tolist() == [[False, True, True, False], [False, True, False, False]]


def test_scripts_without_blanks_have_no_whole_words(padded):
    tokens = ending_in(padded[1].tokens, [[" 红", "苹果", "树", "a"], ["苹", "果", "abc", " "]])
    mask = tokens.select("苹果")
    assert mask[:, -4:].tolist() == [[False, True, False, False], [True, True, False, False]]
    assert mask.sum() == 3


def ending_in(tokens, rows):
    """The same positions with four words of text at the end of every row, and no other text."""
    kind = tokens.kind.masked_fill(tokens.kind == KINDS.index("text"), KINDS.index("special"))
    kind[:, -4:] = KINDS.index("text")
    words = tuple((*own[:-4], *given) for own, given in zip(tokens.words, rows, strict=True))
    return replace(tokens, kind=kind, words=words)


def test_a_character_of_several_tokens_is_found_in_all_of_them(tiny):
    sample = tiny("llava-clip-llama").prepare(images=random_image(32, 32), text="red 中 shapes")
    assert chosen(sample.tokens, "中") == [["中 1/3", "中 2/3", "中 3/3"]]
    assert chosen(sample.tokens, "中 shapes")[0][-1] == " shapes"


def test_positions_are_a_selection_of_either_tower(padded):
    tokens = padded[1].tokens
    start, n = int(tokens.first.max()), tokens.live.shape[1]
    for given, want in (
        (start, [start]), ([start, n - 1], [start, n - 1]), ((n - 2,), [n - 2]),
        (slice(start, start + 3), [start, start + 1, start + 2]), (slice(n - 2, None), [n - 2, n - 1]),
    ):  # fmt: skip
        assert [row.nonzero().flatten().tolist() for row in tokens.select(given)] == [want, want]
    assert tokens.vision.select([0, 5]).nonzero().tolist() == [[0, 0], [0, 5], [1, 0], [1, 5]]
    assert tokens.vision.select(slice(None, 2)).sum(1).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (-1, "position -1 in the language tower; expected 0 to .*never negative.*called 'last'"),
        (slice(-2, None), "position -2 .*called 'last'"),
        ([10**6], "position 1000000 in the language tower; expected 0 to"),
        ([0], "position 0 in the language tower, which is padding in row 0"),
        (slice(3), "position 0 .* is padding in row 0"),
        (
            [],
            r"type list in the language tower, \[\]; expected a name such as 'image' or 'last', words",
        ),
        (slice(0, -1), "of type slice"),
        (True, "of type bool"),
        ([0.5], "of type list"),
        (None, "of type NoneType"),
    ],
)
def test_positions_that_are_none_are_refused(padded, given, message):
    with pytest.raises(SelectionError, match=message):
        padded[1].tokens.select(given)


def test_probes_and_interventions_take_words_and_positions(padded):
    """The same as the mask that they stand for."""
    lvlm, sample = padded
    tokens, last = sample.tokens, sample.tokens.live.shape[1] - 1
    red = tokens.select("red")
    named = ss.AttentionMass({"red": "red", "two": [last - 1, last]}, queries=last)
    two = torch.zeros_like(red)
    two[:, -2:] = True
    masked = ss.AttentionMass({"red": red, "two": two}, queries=tokens.select("last"))
    edits = [ss.MaskKeys("red", queries=slice(last - 1, None)), ss.MaskKeys(red, queries=two)]
    runs = [lvlm.run(sample, [named, masked], [edit]) for edit in edits]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert not torch.equal(runs[0].logits, lvlm.run(sample).logits)
    assert torch.equal(runs[0][named].mass, runs[0][masked].mass)
    patches = torch.zeros_like(tokens.vision.live)
    patches[:, [3, 4]] = True
    logits = [
        lvlm.run(sample, interventions=[ss.MaskKeys(given, tower="vision")]).logits
        for given in ([3, 4], patches)
    ]
    assert torch.equal(*logits)


def test_vision_selections_by_name(tiny):
    _, clip, _ = mixed_batch(tiny, "llava-clip-llama")
    vision = clip.tokens.vision
    assert vision.select("cls").nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    assert not vision.select("register").any()
    assert torch.equal(vision.select("patch") | vision.select("cls"), vision.select("all"))
    assert vision.batch_row.tolist() == [0, 1, 1]
    _, siglip, _ = mixed_batch(tiny, "llava-siglip-qwen2")
    assert not siglip.tokens.vision.select("cls").any()


def test_scores_of_vit_tokens_merge_by_hand(tiny):
    """Four patches feed one token: max, mean and any of 1, -2, 3, 0 are 3, 0.5 and 1."""
    sample = tiny("qwen2.5-vl").prepare(images=random_image(56, 56), text="what")
    tokens = sample.tokens
    scores = torch.full((1, 16), -1.0)
    scores[0, :4] = torch.tensor([1.0, -2.0, 3.0, 0.0])
    visual = tokens.image >= 0
    for merge, first, other in (("max", 3.0, -1.0), ("mean", 0.5, -1.0), ("any", 1.0, 0.0)):
        merged = tokens.from_vision(scores, merge=merge)
        assert merged[visual].tolist() == [first, other, other, other]
        assert merged[~visual].isnan().all()
    with pytest.raises(SelectionError, match="merge='sum'; expected one of"):
        tokens.from_vision(scores, merge="sum")


def test_scores_of_an_unmerged_tower_move_to_their_positions(tiny):
    """LLaVA drops CLS: patch 1 of the ViT is the first image token."""
    sample = tiny("llava-clip-llama").prepare(images=random_image(32, 32), text="what")
    scores = torch.arange(17.0)[None]
    carried = sample.tokens.from_vision(scores)
    assert carried[sample.tokens.image >= 0].tolist() == [float(i) for i in range(1, 17)]


@pytest.mark.parametrize("family", list(EXACT))
def test_the_table_has_a_line_per_live_position(tiny, family):
    lvlm, sample, _ = mixed_batch(tiny, family)
    table = sample.tokens.to_dataframe()
    assert isinstance(table, pd.DataFrame)
    assert len(table) == int(sample.tokens.live.sum())
    assert set(table["kind"]) <= set(KINDS) - {"pad"}
    pictures = table[table["kind"] == "image"]
    assert (pictures["vit_tokens"].map(len) == lvlm.anatomy.merge**2).all()
    assert (pictures["x1"] > pictures["x0"]).all()
    words = table[table["kind"] == "text"]
    assert words["x0"].isna().all()
    assert (words["image"] == -1).all()
    line = table.iloc[len(table) - 1]
    assert line["word"] == sample.tokens.words[1][int(line["pos"])]
    assert math.isclose(line["id"], int(sample.tokens.ids[1, -1]))
