"""Asking a model about scenes, and counting right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from sinkscope.bundled.scenes import Question, Scene, all_questions, ask

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

Pair = tuple[Scene, Question]


def prompt(processor: LlavaProcessor, text: str) -> str:
    """The single-turn prompt of one image and one question, up to and with `ASSISTANT:`."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    conversation = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, add_generation_prompt=True)


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pairs: Sequence[Pair],
    batch_size: int = 100,
) -> list[str]:
    """The model's greedy answers, in the order of `pairs`; at most three new tokens each."""
    generate = cast(Any, model).generate  # its typed `self` does not take the class that has it
    answers: list[str] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        inputs = processor(
            images=[scene.image for scene, _ in batch],
            text=[prompt(processor, question.text) for _, question in batch],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.no_grad():
            output = generate(**inputs, max_new_tokens=3, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new_tokens, skip_special_tokens=True)
    return [text.strip() for text in answers]


def one_question_per_task(scene: Scene) -> list[Pair]:
    """One question of every task about this scene, chosen by the scene's seed."""
    shuffled = ask(scene, seed=0, n=len(all_questions(scene)))
    by_task = {question.task: question for question in reversed(shuffled)}
    return [(scene, question) for question in by_task.values()]


def right_by_task(pairs: Sequence[Pair], answers: Sequence[str]) -> dict[str, list[bool]]:
    """For every task, whether each answer equals the truth exactly.

    Raises:
        ValueError: if there is not one answer per pair.
    """
    result: dict[str, list[bool]] = {}
    for (_, question), text in zip(pairs, answers, strict=True):
        result.setdefault(question.task, []).append(text == question.answer)
    return result
