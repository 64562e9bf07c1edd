"""From a question, chat messages or a finished prompt to the prompt of a row and its pictures."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from sinkscope.errors import InputError
from sinkscope.models.pictures import open_image

PLACE = "<image>"  # the image in questions of the LLaVA JSON format, whatever the model calls it
SOURCES = ("image", "url", "path", "base64", "image_url")  # keys of a picture in a chat message


@dataclass(frozen=True)
class Marks:
    """What a processor reads as an image, also spelled out (``images``), or a video (``all``)."""

    image: str
    images: tuple[str, ...]
    all: tuple[str, ...]


def marks_of(processor: Any) -> Marks:
    """The marks of a processor."""
    image = getattr(processor, "image_token", None) or PLACE
    inner = getattr(getattr(processor, "tokenizer", None), "image_token", None)
    video = getattr(processor, "video_token", None)
    images = tuple(dict.fromkeys(mark for mark in (image, inner) if mark))
    return Marks(image, images, (*images, video) if video else images)


def check_words(text: str, marks: Marks, who: str) -> None:
    """Refuse a mark inside of words; ``who`` begins the message."""
    for mark in marks.all:
        if mark in text:
            raise InputError(
                f"{who} {mark!r} inside of {text[:60]!r}, which the model reads as an image or a video; "
                "expected words. For the image's place write it alone on the first or last line; for a "
                f"finished prompt, rendered=True; for the letters write {mark[0] + ' ' + mark[1:]!r}."
            )


def question_of(text: str, marks: Marks, images: int | None = None, who: str = "Got") -> str:
    """A question without marks that stand alone on its first or last lines: there is the image's place.

    Such marks must be as many as the images, unless that is None. ``who`` begins messages.
    """
    mark = re.compile("|".join(map(re.escape, {PLACE, *marks.images})))
    lines, found = text.split("\n"), 0
    for end in (0, -1):
        while lines and mark.search(lines[end]) and not mark.sub("", lines[end]).strip():
            found += len(mark.findall(lines.pop(end)))
    if found and images not in (None, found):
        got = f"{who} {found} image marks and {images} images; expected as many"
        raise InputError(f"{got}. Write one {PLACE!r} per image, or none: then they come first.")
    question = "\n".join(lines).strip() if found else text
    if found and not question:
        raise InputError(f"{who} no text beside {text.strip()!r}; expected a question.")
    check_words(question, marks, who)
    return question


def check_questions(processor: Any, items: Iterable[Any]) -> None:
    """Refuse questions that `LVLM.prepare` would, and answers with a mark, before long work."""
    marks = marks_of(processor)
    for i, item in enumerate(items):
        question_of(item.question, marks, who=f"Record {i} has")
        for words in (getattr(item, "answer", ""), *getattr(item, "choices", ())):
            check_words(words, marks, f"Record {i} has")


def as_rows(images: Any, text: Any) -> tuple[list[list[Image.Image]], list[Any]]:
    """The images of every batch row, opened, and its text or its chat messages without images."""
    single = isinstance(text, str) or _is_chat(text)
    texts = [text] if single or not isinstance(text, Sequence) else list(text)
    rows, asked, opened = [], [], {}
    for i, (entry, own) in enumerate(zip(texts, _paired(images, texts, single), strict=True)):
        if not isinstance(entry, str):
            own, entry = _unfold(entry, own, f"Row {i} has")
        if not own:
            raise InputError(f"Got no image in row {i}; expected at least one image per row.")
        for picture in own:
            if id(picture) not in opened:  # one picture in many rows is held once
                opened[id(picture)] = (open_image(picture), picture)
        rows.append([opened[id(picture)][0] for picture in own])
        asked.append(entry)
    return rows, asked


def _is_chat(given: Any) -> bool:
    many = isinstance(given, (list, tuple)) and len(given) > 0
    return many and all(isinstance(one, Mapping) and "bytes" not in one for one in given)


def _paired(images: Any, texts: Sequence[Any], single: bool) -> list[Any]:
    """The images of every text, unopened; none where chat messages hold them."""
    many = isinstance(images, (list, tuple))
    bare = images is None or (many and not images)
    wrong = [type(one).__name__ for one in texts if not isinstance(one, str) and not _is_chat(one)]
    message = ""
    if _is_chat(images) and texts[0] is None:
        message = "chat messages as images; expected text. Write lvlm.prepare(text=messages)."
    elif bare and not (texts and all(map(_is_chat, texts))):
        message = "no image; expected at least one. Write lvlm.prepare(images=image, text='...')."
    elif not texts or texts[0] is None or (isinstance(texts[0], str) and texts == [""]):
        message = "no text; expected a question. Write prepare(images=image, text='What is it?')."
    elif wrong:
        message = f"a text of type {wrong[0]}; expected a str or chat messages, or a list of them."
    elif many and images and not single and len(images) != len(texts):
        message = f"{len(images)} image entries for {len(texts)} texts; expected one each. Write "
        message += "images=[[a, b], [c]] for several images in a row, images=a for one in all rows."
    if message:
        raise InputError(f"Got {message}")
    if bare or not many:
        return [[] if bare else [images]] * len(texts)  # one picture for all questions
    rows = [images] if single else images
    return [entry if isinstance(entry, (list, tuple)) else [entry] for entry in rows]


def _unfold(
    messages: Sequence[Mapping[str, Any]], given: Sequence[Any], who: str
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The pictures of chat messages in order, those ``given`` included, and the messages without."""
    left, pictures, bare = list(given), [], []
    for message in messages:
        content = message.get("content")
        if "role" not in message or not isinstance(content, (str, list, tuple)):
            got = f"{who} a message with {sorted(message)}; expected role and content"
            write = "{'role': 'user', 'content': [{'type': 'text', 'text': '...'}]}"
            raise InputError(f"{got}, a str or a list of parts. Write {write}.")
        parts: list[Any] = []
        for part in () if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind not in ("text", "image", "image_url"):
                got = f"{who} a part of type {kind!r} in a message; expected 'text' or 'image'"
                raise InputError(f"{got}. Write the frames of a video as images.")
            if kind != "text":
                own = [_source(name, part[name]) for name in SOURCES if part.get(name) is not None]
                if not own and not left:
                    got = f"{who} more image parts than images; expected a picture for each"
                    raise InputError(got + ". Write {'type': 'image', 'image': picture}.")
                pictures.append(own[0] if own else left.pop(0))
            parts.append(dict(part) if kind == "text" else {"type": "image"})
        bare.append({**message, "content": content if isinstance(content, str) else parts})
    if left:
        got = f"{who} {len(left)} images for which the messages have no part; expected a part for each"
        raise InputError(got + ". Write {'type': 'image'} where it belongs.")
    return pictures, bare


def _source(name: str, value: Any) -> Any:
    if name == "base64" and not str(value).startswith("data:"):
        return f"data:image;base64,{value}"
    return value.get("url") if name == "image_url" and isinstance(value, Mapping) else value


def render(processor: Any, images: int, asked: Any, *, rendered: bool, row: int) -> str:
    """The full prompt of a row with some images, through the chat template if there is one.

    ``asked`` is a question, chat messages without pictures, or a finished prompt if ``rendered``.
    """
    marks, who, prompt = marks_of(processor), f"Row {row} has", asked
    template = getattr(processor, "chat_template", None)
    template = template or getattr(processor.tokenizer, "chat_template", None)
    if not rendered and isinstance(asked, str):
        asked = question_of(asked, marks, images, who)
        prompt = marks.image * images + "\n" + asked
        parts = [{"type": "image"}] * images + [{"type": "text", "text": asked}]
        asked = [{"role": "user", "content": parts}]
    elif not rendered:
        if not template:
            got = f"{who} chat messages, and the processor has no chat template; expected one"
            write = "processor.chat_template = '...', or a finished prompt with rendered=True"
            raise InputError(f"{got}. Write {write}.")
        for content in (message["content"] for message in asked):
            for text in [content] if isinstance(content, str) else [p.get("text") for p in content]:
                check_words(text or "", marks, who)
    if template and not rendered:
        opens = asked[-1]["role"] != "assistant"  # else its own turn goes on
        options = dict(chat_template=template, add_generation_prompt=opens, tokenize=False)
        try:
            prompt = processor.apply_chat_template(list(asked), **options)
        except (TemplateError, TypeError, KeyError) as error:
            raise InputError(
                f"The model's chat template refuses messages of the roles {[m['role'] for m in asked]} "
                f"({error}); expected what it was written for: often 'user' first, then in turns."
            ) from error
    if (found := prompt.count(marks.image)) != images:
        got = f"Got {found} {marks.image!r} tokens and {images} images in row {row}"
        raise InputError(f"{got}; expected as many, in a finished prompt or from the template.")
    return prompt
