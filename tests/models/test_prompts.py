"""Questions, chat messages and finished prompts give the ids that the model's own processor gives by hand."""

import base64

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import InputError
from sinkscope.testing import random_image, tiny_llava

FAMILIES = ("llava-clip-llama", "qwen2.5-vl", "gemma3")
A, B = random_image(60, 90, 0), random_image(84, 56, 1)


def by_hand(lvlm, messages, **options):
    """What ``transformers`` makes of chat messages."""
    return lvlm.processor.apply_chat_template(
        messages,
        **{"add_generation_prompt": True, **options},
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def asked(text, *pictures):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def check(sample, expected):
    assert set(sample.inputs) == set(expected)
    for name, value in expected.items():
        assert torch.equal(sample.inputs[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_what_the_chat_template_makes_of_it(tiny, family):
    lvlm = tiny(family)
    check(lvlm.prepare([A, B], "which ?"), by_hand(lvlm, [asked("which ?", A, B)]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own", [False, True])
def test_a_mark_alone_on_the_first_or_last_line_changes_nothing(tiny, family, own):
    """LLaVA's JSON writes ``<image>`` there for every model; some write the model's own token."""
    lvlm = tiny(family)
    mark = lvlm.processor.image_token if own else "<image>"
    plain = lvlm.prepare(A, "what is it")
    for text in ("{}\nwhat is it", "what is it\n{}", " {} \r\nwhat is it", "{}\n\nwhat is it"):
        check(lvlm.prepare(A, text.format(mark)), plain.inputs)
    both = lvlm.prepare([A, B], "which ?")
    for text in ("{0}\n{0}\nwhich ?", "{0}{0}\nwhich ?", "{0}\nwhich ?\n{0}"):
        check(lvlm.prepare([A, B], text.format(mark)), both.inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mark_inside_of_words_is_refused(tiny, family):
    lvlm = tiny(family)
    mark = lvlm.processor.image_token
    apart = mark[0] + " " + mark[1:]
    says = rf"Row 0 has '{mark}' inside of .*rendered=True.* write '{apart}'".replace("|", r"\|")
    for text in (f"what does {mark} mean", f"{mark} what", f"USER: {mark}\nwhat ASSISTANT:"):
        with pytest.raises(InputError, match=says):
            lvlm.prepare(A, text)
    with pytest.raises(InputError, match=says):
        lvlm.prepare(text=[asked(f"what is {mark} ?", A)])
    plain = lvlm.prepare(A, f"what does {apart} mean")
    check(plain, by_hand(lvlm, [asked(f"what does {apart} mean", A)]))


def test_where_it_is_no_token_the_letters_are_words(tiny):
    """For Qwen ``<image>`` inside of a question is text like any other."""
    lvlm = tiny("qwen2.5-vl")
    check(lvlm.prepare(A, "an <image> tag ?"), by_hand(lvlm, [asked("an <image> tag ?", A)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_finished_prompt_is_said_to_be_one(tiny, family):
    lvlm = tiny(family)
    plain = lvlm.prepare([[A], [A, B]], ["what ?", "which of these is it ?"])
    again = lvlm.prepare([[A], [A, B]], list(plain.texts), rendered=True)
    assert again.texts == plain.texts
    check(again, plain.inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_messages_are_prepared_as_by_hand(tiny, family, tmp_path):
    lvlm = tiny(family)
    A.save(tmp_path / "a.png")
    coded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    turns = [asked("what ?", A), said, asked("and this ?", B)]
    check(lvlm.prepare(text=turns), by_hand(lvlm, turns))
    bare = [asked("what ?"), said, asked("and this ?")]
    for turn in bare[::2]:
        turn["content"].insert(0, {"type": "image"})
    check(lvlm.prepare([A, B], bare), by_hand(lvlm, turns))
    check(lvlm.prepare(text=turns[:2]), by_hand(lvlm, turns[:2], add_generation_prompt=False))
    for part in (
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "url": str(tmp_path / "a.png")},
        {"type": "image", "base64": coded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
    ):
        one = [{"role": "user", "content": [part, {"type": "text", "text": "what ?"}]}]
        check(lvlm.prepare(text=one), by_hand(lvlm, [asked("what ?", A)]))
    assert turns[0] == asked("what ?", A)
    both = lvlm.prepare(text=[[asked("what ?", A)], [asked("which of these is it ?", B)]])
    check(both, lvlm.prepare([A, B], ["what ?", "which of these is it ?"]).inputs)


def test_one_picture_serves_many_questions_and_forms_may_be_mixed(tiny, tmp_path):
    lvlm, texts = tiny("llava-clip-llama"), ["what ?", "how many red shapes ?", "why ?"]
    A.save(tmp_path / "a.png")
    expected = lvlm.prepare([A, A, A], texts)
    served = lvlm.prepare(A, texts)
    check(served, expected.inputs)
    assert len({id(row[0]) for row in served.images}) == 1
    check(lvlm.prepare(tmp_path / "a.png", texts), expected.inputs)
    array = np.array(A)
    mixed = [A, str(tmp_path / "a.png"), torch.from_numpy(array).permute(2, 0, 1) / 255]
    check(lvlm.prepare(mixed, texts), expected.inputs)
    check(lvlm.prepare([[array], (tmp_path / "a.png").read_bytes(), [A]], texts), expected.inputs)


LLAVA_JSON = [{"from": "human", "value": "<image>\nwhat?"}]
REFUSED = {
    "messages as images": (
        lambda p: p([asked("what ?", A)]),
        "Write lvlm.prepare\\(text=messages\\)",
    ),
    "messages of another format": (lambda p: p(A, LLAVA_JSON), r"message with \['from', 'value'\]"),
    "a video": (
        lambda p: p(text=[{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}]),
        "part of type 'video' .*frames of a video as images",
    ),
    "a part that is a str": (lambda p: p(A, [{"role": "user", "content": ["what"]}]), "type 'str'"),
    "messages without image": (lambda p: p(text=[asked("what ?")]), "no image in row 0"),
    "an image too few": (
        lambda p: p(text=[{"role": "user", "content": [{"type": "image"}]}]),
        "more image parts than images",
    ),
    "an image too many": (
        lambda p: p([A], [asked("what ?", B)]),
        "1 images for which the messages",
    ),
    "an unknown message": (lambda p: p(A, [A]), "a text of type Image"),
    "marks and images": (lambda p: p([A, B], "<image>\nwhich ?"), "1 image marks and 2 images"),
    "a mark and no question": (lambda p: p(A, "<image>\n"), "no text beside '<image>'"),
    "a finished prompt without mark": (
        lambda p: p(A, "USER: what ?", rendered=True),
        "0 '<image>' tokens and 1 images in row 0",
    ),
    "finished messages": (
        lambda p: p(text=[asked("w", A)], rendered=True),
        "rendered=True and list",
    ),
    "rendered of another type": (
        lambda p: p(A, "what", rendered="no"),
        "rendered='no'; expected True or False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tiny, name):
    wrong_use, says = REFUSED[name]
    with pytest.raises(InputError, match=says) as caught:
        wrong_use(tiny("llava-clip-llama").prepare)
    assert str(caught.value).endswith(".")


def test_a_template_that_refuses_or_loses_the_image_is_named(monkeypatch):
    lvlm = ss.LVLM(*tiny_llava())
    chats = {
        "{{ raise_exception('user first') }}": "refuses messages of the roles \\['user'\\] .user first",
        "{{ messages[0].content + '' }}": "refuses messages",
        "{{ messages[0].role }}": "0 '<image>' tokens and 1 images",
    }
    for template, says in chats.items():
        monkeypatch.setattr(lvlm.processor, "chat_template", template)
        with pytest.raises(InputError, match=says):
            lvlm.prepare(A, "what ?")
    monkeypatch.setattr(lvlm.processor, "chat_template", None)
    monkeypatch.setattr(lvlm.tokenizer, "chat_template", None)
    assert lvlm.prepare(A, "<image>\nwhat ?").texts == ("<image>\nwhat ?",)
    with pytest.raises(InputError, match="no chat template"):
        lvlm.prepare(text=[asked("what ?", A)])


def test_experiments_prepare_alike_and_refuse_before_they_run(tiny):
    """With ``<image>`` on the first line nothing changes; inside of words it ends no run halfway."""
    lvlm = tiny("llava-clip-llama")
    plain = [
        {
            "image": random_image(48, 48, i % 4),
            "question": "what ?",
            "answer": "red",
            "image_id": i % 4,
        }
        for i in range(8)
    ]
    marked = [{**item, "question": "<image>\nwhat ?"} for item in plain]
    tables = [ss.compare(lvlm, items, {"base": []}).table for items in (plain, marked)]
    assert tables[0]["given"].tolist() == tables[1]["given"].tolist()
    wrong = [
        *plain[:-1],
        {**plain[-1], "question": "is an <image> tag red ?", "attributes": {"n": 1}},
    ]
    labelled = [
        {
            **wrong[min(i, 7)],
            "attributes": {"n": i % 2},
            "image": random_image(40, 40, i),
            "image_id": i,
        }
        for i in range(24)
    ]
    choices = [*plain[:-1], {**plain[-1], "choices": ("red", "an <image> tag red ?")}]
    runs = {
        "choices": lambda: ss.compare(lvlm, choices, {"base": []}),
        "compare": lambda: ss.compare(lvlm, wrong, {"base": []}),
        "sweep": lambda: ss.sweep(lvlm, wrong, layers=[0], v_detector=ss.detectors.Norm(1e-6)),
        "dry sweep": lambda: ss.sweep(lvlm, wrong, dry_run=True),
        "probes": lambda: ss.linear_probes(lvlm, labelled),
        "training": lambda: ss.train_lsg(lvlm, wrong, layers=[0]),
    }
    for run in runs.values():
        with pytest.raises(
            InputError, match=r"^Record 7 has '<image>' inside of '(is )?an <image> tag"
        ):
            run()
