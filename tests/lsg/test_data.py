"""Batches for training: answers after prompts, padding, and what is refused."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

import sinkscope as ss
from sinkscope.data.answers import answer_ids, ask, score_options
from sinkscope.data.batches import IGNORED, TokenScores, end_token, make_batch, read_dataset
from sinkscope.errors import InputError
from sinkscope.experiments import Item
from sinkscope.testing import TINY, random_image


def records(n=5):
    """Questions and answers of several lengths, one with two images."""
    questions = ("what is it", "how many blue squares are there in the scene?")
    answers = ("circle", "two blue squares", "yes")
    out = [
        {
            "image": random_image(48, 48, i),
            "question": questions[i % 2],
            "answer": answers[i % 3],
            "image_id": i,
        }
        for i in range(n)
    ]
    out[-1]["image"] = [random_image(48, 48, 90), random_image(48, 48, 91)]
    return out


@pytest.fixture(params=sorted(TINY))
def lvlm(request):
    return ss.LVLM(*TINY[request.param](), verify=False)


def test_a_padded_batch_has_the_losses_of_its_rows(lvlm):
    """Against transformers' own loss, of one row without padding at a time."""
    data = read_dataset(records(), lvlm.tokenizer)
    batch = make_batch(lvlm, data, range(5))
    with torch.no_grad():
        logits = lvlm.module(**batch.inputs).logits
        rows = torch.arange(5)[:, None]
        losses = cross_entropy(
            logits[rows, batch.positions].flatten(0, 1),
            batch.targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).reshape(5, -1)
        for row in range(5):
            one = make_batch(lvlm, data, [row])
            assert bool(one.inputs["attention_mask"].all())
            expected = lvlm.module(**one.inputs, labels=one.labels).loss * one.answer_tokens
            torch.testing.assert_close(losses[row].sum(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_is_the_prompt_of_generation_and_the_answer(lvlm):
    data = read_dataset(records(), lvlm.tokenizer)
    batch = make_batch(lvlm, data, range(5))
    for row, record in enumerate(records()):
        prompt = lvlm.prepare(images=record["image"], text=record["question"])
        live = batch.inputs["attention_mask"][row].bool()
        n = len(prompt.tokens.ids[0])
        assert batch.inputs["input_ids"][row][live][:n].tolist() == prompt.tokens.ids[0].tolist()
        assert bool((batch.labels[row][live][:n] == IGNORED).all())
        labels = batch.labels[row][batch.labels[row] != IGNORED]
        assert labels.tolist() == batch.inputs["input_ids"][row][live][n:].tolist()
        assert labels[-1] == end_token(lvlm)
        text = lvlm.tokenizer.decode(labels[:-1])
        assert text.strip() == record["answer"]
        assert batch.tokens.last[row] == len(live) - len(labels) - 1
        assert int(batch.tokens.live[row].sum()) == n
    bare = make_batch(lvlm, data, range(5), append_end=False)
    assert bare.answer_tokens == batch.answer_tokens - 5


def test_the_end_is_the_one_of_the_chat_template():
    lvlm = ss.LVLM(*TINY["qwen2.5-vl"](), verify=False)
    ends = ["<|endoftext|>", "<|im_end|>"]
    ids = lvlm.tokenizer.convert_tokens_to_ids(ends)
    lvlm.module.generation_config.eos_token_id = ids
    assert end_token(lvlm) == ids[1]
    lvlm.module.generation_config.eos_token_id = ids[:1]
    assert end_token(lvlm) == ids[0]


def test_the_space_before_an_answer():
    lvlm = ss.LVLM(*TINY["llava-clip-llama"](), verify=False)

    def decoded(prompt, answer):
        return lvlm.tokenizer.decode(answer_ids(lvlm.tokenizer, prompt, answer))

    assert decoded("ASSISTANT:", "red") == " red"
    assert decoded("ASSISTANT:", " red") == " red"
    assert decoded("assistant\n", "red") == "red"
    with pytest.raises(InputError, match=r"ends in 'ASSISTANT: ', whose.*end without a space"):
        answer_ids(lvlm.tokenizer, "ASSISTANT: ", "red")


def test_training_and_scores_read_the_same_tokens(lvlm):
    """The answer's ids, and its log-probability: transformers' loss on the batch of training."""
    record = {**records(1)[0], "answer": "two blue squares"}
    data = read_dataset([record], lvlm.tokenizer)
    batch = make_batch(lvlm, data, [0], append_end=False)
    labels = batch.labels[batch.labels != IGNORED].tolist()
    sample = lvlm.prepare(images=record["image"], text=record["question"])
    (prompt,) = sample.texts
    between = "" if prompt.endswith("\n") else " "
    assert lvlm.tokenizer.decode(labels) == between + record["answer"]
    item = Item(**record)
    options = ask(lvlm.tokenizer, prompt, replace(item, choices=(item.answer, "red"))).options
    assert [list(ids) for ids in options[:2]] == [labels, labels]
    with torch.no_grad():
        loss = lvlm.module(**batch.inputs, labels=batch.labels).loss * len(labels)
    rule = ss.detectors.NoSinks()
    swept = ss.sweep(lvlm, [record], [0], [(0.5, 0.5)], v_detector=rule, score="logprob")
    assert swept.table["base_logprob"][0] == pytest.approx(-float(loss), abs=1e-4)
    scores, *_ = score_options(lvlm, sample, [replace(item, choices=(item.answer,))], [], False)
    assert float(scores[0, 0]) == pytest.approx(-float(loss), abs=1e-4)


def test_scores_of_tokens_are_pytorchs_cross_entropy():
    """The loss and its gradient to the bit; sums, means and exactness by hand."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 40, 60, generator=generator)).requires_grad_()
    targets = torch.randint(0, 60, (3, 40), generator=generator)
    targets[0, :30] = IGNORED
    targets[2] = logits.argmax(-1)[2]
    found = TokenScores.of(logits, targets)
    (ours,) = torch.autograd.grad(found.loss, logits)
    flat = (logits.flatten(0, 1), targets.flatten())
    expected = cross_entropy(*flat, ignore_index=IGNORED, reduction="sum")
    (theirs,) = torch.autograd.grad(expected, logits)
    assert torch.equal(found.loss, expected)
    assert torch.equal(ours, theirs)
    assert found.exact.tolist() == [False, False, True]
    assert found.logprobs[0, :30].tolist() == [0.0] * 30
    rows = -cross_entropy(*flat, ignore_index=IGNORED, reduction="none").reshape(3, 40).sum(1)
    torch.testing.assert_close(found.sums, rows)
    torch.testing.assert_close(found.means, rows / torch.tensor([10, 40, 40]))
    several = TokenScores.of(logits, targets[..., None].expand(-1, -1, 2))
    assert torch.equal(several.logprobs[..., 1], found.logprobs)


def test_sentencepiece_gives_an_answer_one_space():
    """As Llama's: it marks the beginning of every word, and of a text, so ids are those alone."""
    words = ["<unk>", "\u2581ASSISTANT:", "\u2581red", "\u2581blue"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert answer_ids(tokenizer, "ASSISTANT:", "red blue") == (2, 3)
    assert tokenizer("red blue", add_special_tokens=False)["input_ids"] == [2, 3]


def test_the_split_keeps_an_image_on_one_side():
    same = random_image(32, 32, 5)
    data = read_dataset(
        [{"image": random_image(32, 32, i // 3), "question": "q", "answer": "a"} for i in range(30)]
        + [{"image": same, "question": "q", "answer": "b"}]
    )
    assert len(set(data.images)) == 10
    first, second = data.split(0.3, seed=1)
    assert sorted(first + second) == list(range(31))
    assert len({data.images[i] for i in second}) == 3
    assert not {data.images[i] for i in first} & {data.images[i] for i in second}
    assert (first, second) == data.split(0.3, seed=1) != data.split(0.3, seed=2)
    assert data.split(0.0, seed=1) == (list(range(31)), [])
    with pytest.raises(InputError, match="about one image and validation"):
        read_dataset([{"image": same, "question": "q", "answer": "a"}] * 3).split(0.1, 0)
    with pytest.raises(InputError, match=r"Got validation=1\.5"):
        data.split(1.5, 0)


def test_records_that_share_an_image_stay_together(tmp_path, monkeypatch):
    """a|b, b|c and c are one group; d under two spellings of its path is another."""
    a, b, c, d = (random_image(32, 32, i) for i in range(4))
    (tmp_path / "x").mkdir()
    d.save(tmp_path / "x" / "d.png")
    monkeypatch.chdir(tmp_path)
    images = [[a, b], c, "x/d.png", [b, c], "./x/../x/d.png", random_image(32, 32, 9)]
    data = read_dataset([{"image": i, "question": "q", "answer": "a"} for i in images])
    assert [data.groups.index(name) for name in data.groups] == [0, 0, 2, 0, 2, 5]
    for seed in range(8):
        first, second = data.split(0.34, seed)
        assert not {data.groups[i] for i in first} & {data.groups[i] for i in second}
        assert len({data.groups[i] for i in second}) == 1
    chain = [
        {"image": [a, b], "question": "q", "answer": "a"},
        {"image": b, "question": "q", "answer": "a"},
    ]
    with pytest.raises(InputError, match="that no record has both of"):
        read_dataset(chain).split(0.5, 0)


def test_a_transform_of_the_users_own_is_left_alone():
    def grey(batch):
        return {**batch, "image": [image.convert("L").convert("RGB") for image in batch["image"]]}

    plain = records(4)[:3]
    columns = {name: [record[name] for record in plain] for name in plain[0]}
    del columns["image_id"]
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data = read_dataset(made.with_transform(grey))
    want = read_dataset(
        [{**r, "image": r["image"].convert("L").convert("RGB"), "image_id": None} for r in plain]
    )
    assert data.images == want.images


class Lazy:
    """A dataset that counts the images that are alive."""

    def __init__(self, n):
        self.n, self.alive, self.most = n, 0, 0

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        owner = self

        class Pixels(np.ndarray):
            def __del__(self):
                if self.base is None:
                    owner.alive -= 1

        if not 0 <= index < self.n:
            raise IndexError
        pixels = Pixels((32, 32, 3), dtype=np.uint8)
        pixels[:] = index
        self.alive += 1
        self.most = max(self.most, self.alive)
        return {"image": pixels, "question": "what is it", "answer": "circle"}


def test_no_more_than_a_batch_of_images_is_held():
    lvlm = ss.LVLM(*TINY["llava-clip-llama"](), verify=False)
    lazy = Lazy(40)
    data = read_dataset(lazy, lvlm.tokenizer)
    assert lazy.most <= 2
    for start in range(0, 40, 4):
        make_batch(lvlm, data, range(start, start + 4))
    assert lazy.most <= 5
    assert len(set(data.images)) == 40


def test_datasets_and_items_are_the_same_questions(tmp_path):
    """A saved ``datasets.Dataset`` gives the same batch as its records."""
    lvlm = ss.LVLM(*TINY["llava-clip-llama"](), verify=False)
    plain = records(5)[:4]
    columns = {name: [record[name] for record in plain] for name in plain[0]}
    features = datasets.Features(
        image=datasets.Image(),
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
        image_id=datasets.Value("int64"),
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "d"))
    stored = datasets.load_from_disk(str(tmp_path / "d"))
    items = [Item(**record) for record in plain]
    several = [
        read_dataset(given, lvlm.tokenizer) for given in (stored, items, plain, (r for r in plain))
    ]
    assert len({data.fingerprint for data in several}) == 1
    one, *others = [make_batch(lvlm, data, [2, 0]) for data in several]
    for other in others:
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
    changed = [{**plain[0], "answer": "square"}, *plain[1:]]
    assert read_dataset(changed).fingerprint != several[0].fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"Record 1 .* has no image; expected image, question and answer"),
        ({"answer": None}, r"Record 1 .* has no answer"),
        ({"answer": " "}, r"Record 1 has answer=' '; expected a str with at least one word"),
        ({"answer": 3}, r"Record 1 has answer=3; .* Write str\(\.\.\.\) for numbers"),
        ({"question": ""}, r"Record 1 has question=''"),
        ({"image": [], "image_id": None}, "Record 1 has no image; expected at least one"),
        ({"answer": "a <image> b"}, "Record 1 has the answer 'a <image> b', which holds the token"),
        (
            {"image": "/nowhere/x.png"},
            "Record 1: Got the image '/nowhere/x.png', which is neither an existing",
        ),
        ({"image_id": None}, "Record 1 has no image_id, unlike record 0"),
        ({"answer": "red " * 30}, r"Record 1 has an answer of \d+ tokens; expected at most 20"),
    ],
)
def test_records_that_lack_something_are_named(change, message):
    lvlm = ss.LVLM(*TINY["llava-clip-llama"](), verify=False)
    given = records(3)
    given[1] |= change
    with pytest.raises(InputError, match=message):
        read_dataset(
            given, lvlm.tokenizer, max_answer_tokens=20, image_token=lvlm.anatomy.image_token_id
        )


@pytest.mark.parametrize("given", [3, "scenes", {"train": []}])
def test_what_is_no_dataset_is_refused(given):
    with pytest.raises(InputError, match=r"Got a .* as dataset; expected records"):
        read_dataset(given)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="Got an empty dataset"):
        read_dataset([])


def test_a_row_too_long_for_the_model_is_refused():
    lvlm = ss.LVLM(*TINY["llava-clip-llama"](), verify=False)
    data = read_dataset(records(2), lvlm.tokenizer)
    lvlm.module.config.text_config.max_position_embeddings = 8
    with pytest.raises(InputError, match=r"expected at most 8, the length of the model"):
        make_batch(lvlm, data, [0])
