"""Forward passes of gated models: what gates read in them, and the losses of training.

`share` runs what lies before the last edited block once per batch, without gradient; `answer_losses` runs
the rest once per gate, and its gradient reaches the gate only. Coefficients hold for the answer too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sinkscope.anatomy.towers import Anatomy
from sinkscope.data.ahead import Batches
from sinkscope.data.batches import (
    IGNORED,
    AnswerBatch,
    AnswerData,
    TokenScores,
    batches_of,
)
from sinkscope.detectors.choice import VisionTokens, detector_of, kept_tokens, rule_of
from sinkscope.errors import InputError, InterventionError
from sinkscope.kernels import gating as kernels
from sinkscope.kernels.walk import first_tensor
from sinkscope.lsg.config import GateConfig
from sinkscope.models.inputs import make_sample
from sinkscope.models.lvlm import LVLM
from sinkscope.models.replay import Captured, capture, logits_at, resume
from sinkscope.models.wrapping import evaluated, moved
from sinkscope.protocols import Edit
from sinkscope.sites import Site
from sinkscope.tokens import TokenMap
from sinkscope.training.loop import Losses, Sums

NO_INPUTS = ("labels", "past_key_values", "cache_position", "position_ids", "logits_to_keep")


class Gate(Protocol):
    """What is used of an `LSG` below the module that defines it; see its members there."""

    config: GateConfig

    @property
    def weights(self) -> dict[str, Any]: ...  # noqa: D102
    def check_model(self, anatomy: Anatomy) -> None: ...  # noqa: D102
    def check_weights(self, module: nn.Module, anatomy: Anatomy) -> None: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102


def signals_of(gate: Gate, tokens: TokenMap, step: int = 0) -> list[Edit]:
    """The signals of a gate: edits that change nothing and note under ``id(gate)``; step 0 is the prompt."""
    config, slot, image = gate.config, id(gate), tokens.image >= 0
    if step and config.decode != "refresh":
        return []
    place = ("resid_pre", 0) if isinstance(config.layer, str) else ("resid_post", config.layer)
    reading = {"slot": slot, "signal": "last" if config.signal == "last" else "mean"}
    reading |= {"at": tokens.last, "tokens": tokens.live if config.signal == "mean" else image}
    reading |= {"activation": config.activation, "scale": config.scale, **gate.weights}
    out = [Edit(Site("language", *place), kernels.note_coefficients, reading)]
    if step:
        return out
    if tokens.unmapped:
        what = f"Got a sample in which {tokens.unmapped} for a gate; expected image tokens"
        raise InterventionError(f"{what} whose ViT tokens are known, to find V-sinks among them.")
    detector, vision = detector_of(config.v_detector), tokens.vision
    kept = isinstance(detector, VisionTokens)
    live = kept_tokens(tokens, detector.kind) if kept else vision.live
    rule, layout = rule_of(config.v_detector), vision.layout
    finding = {"slot": slot, "rule": rule, "live": live, "layout": layout}
    finding |= {"image_index": tokens.image_index, "sources": tokens.sources}
    for layer in config.model["feed_layers"]:
        out.append(Edit(Site("vision", "resid_post", layer), kernels.note_v_sinks, finding))
    if config.l_detector is not None:
        rule = rule_of(config.l_detector)
        # A sink is judged by itself; random ones are so many of those whose keys can be scaled.
        judged = image if rule["how"] == "random" else tokens.live
        given = {"slot": slot, "rule": rule, "live": judged}
        out.append(Edit(Site("language", "resid_pre", config.edited), kernels.note_l_sinks, given))
    return out


def vision_states(output: Any) -> Tensor:
    """States of a vision block, ``[image pos d]``, also where it keeps rows and columns apart."""
    found = first_tensor(output).detach()
    return found.flatten(1, 2) if found.ndim == 4 else found


def placed(values: Mapping[str, Any], beside: Tensor) -> dict[str, Any]:
    """Values with all tensors on the device of ``beside``."""
    at = beside.device
    return {k: moved(v, at) if isinstance(v, Tensor) else v for k, v in values.items()}


class Pass:
    """One forward pass; no dataclass, because wrappers of models copy dataclasses among arguments.

    ``tokens`` and ``last``, the last prompt position of every row, are None for a prompt without images,
    where nothing is scaled. ``state`` is the scratch space of the kernels, ``{"step", "memory"}``.
    """

    def __init__(self, tokens: TokenMap | None = None, last: Tensor | None = None) -> None:
        self.tokens, self.last = tokens, last
        self.state: dict[str, Any] = {"step": 0, "memory": {}}

    def at(self, step: int) -> Pass:
        """The pass of a later decode step."""
        out, memory = Pass(self.tokens, self.last), self.state["memory"]
        out.state = {"step": step, "memory": {slot: dict(kept) for slot, kept in memory.items()}}
        return out


def arguments_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    signature = inspect.signature(type(module).forward)
    given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    given.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        if parameter.kind is parameter.VAR_POSITIONAL and given.pop(name, ()):
            what = f"Got arguments without names for {type(module).__name__}, which names none"
            raise InputError(f"{what}; expected model(input_ids=..., pixel_values=...).")
    return given


def images_of(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The pixels of a call, and what the vision tower made of them before the call; no videos."""
    encoded = given.get("mm_encoder_outputs") or {}
    if given.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        what = "Got a video for a gated model; expected images, in which a gate finds its groups."
        raise InputError(f"{what} Pass frames as images, or write gate.detach() first.")
    return given.get("pixel_values"), encoded.get("image")


def started(lvlm: Any, given: Mapping[str, Any], images: Mapping[str, Tensor]) -> Pass:
    """The pass of a prompt with images; ``images`` are those that ``generate()`` encodes before it."""
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and k not in NO_INPUTS}
    try:
        tokens = make_sample(lvlm, None, None, inputs | dict(images)).tokens
    except InputError as error:
        if not images:
            raise
        why = "generate() cuts a prompt for prefill_chunk_size: leave it out."
        if len(ids := given["input_ids"]) > len(ids.unique(dim=0)):
            why = (
                "generate() repeats rows for beams and several sequences: a gate works with greedy "
                "decoding and sampling of one sequence."
            )
        raise InputError(f"{error} {why}") from error
    labels = given.get("labels")
    if labels is None:
        return Pass(tokens, tokens.last)
    wanted = (labels != IGNORED).cpu() & tokens.live  # the prompt ends before the first label
    first = wanted.int().argmax(dim=1)
    if bool((wanted.any(dim=1) & (first == tokens.first)).any()):
        what = "Got labels that begin with the first token of a row; expected none of the prompt."
        raise InputError(f"{what} Write labels[:, :prompt_length] = {IGNORED}.")
    return Pass(tokens, torch.where(wanted.any(dim=1), first - 1, tokens.last))


def continued(before: Pass | None, given: Mapping[str, Any], length: int) -> Pass:
    """The pass that goes on from ``before``, which filled a cache of ``length`` tokens."""
    if before is None:
        raise InputError(
            f"Got a cache of {length} tokens that this gate has not seen; expected that of a prompt which "
            "ran while it was attached, not a copy of it. Write gate.attach(model) before the prompt."
        )
    turn = "Pass the whole conversation with its images and without past_key_values"
    if any(value is not None for value in images_of(given)):
        raise InputError(
            f"Got images behind {length} tokens that are in the cache already; expected them in one "
            f"prompt with all that comes before them. {turn}, and no prefill_chunk_size."
        )
    if before.tokens is None:
        return before.at(before.state["step"] + 1)
    new = given.get("input_ids")
    new = given.get("inputs_embeds") if new is None else new
    rows, many = (0, 0) if new is None else new.shape[:2]
    prompts, prompt = before.tokens.image.shape
    if rows != prompts or many != 1:
        what = f"Got {rows} rows of {many} new tokens to go on from {prompts} gated prompts"
        leave = "leave out beams, several sequences, prefill_chunk_size and assisted decoding"
        raise InputError(f"{what}; expected one token each. {turn}; in generate() {leave}.")
    if length < prompt:
        what = f"Got a cache of {length} tokens whose prompt had {prompt}"
        raise InputError(f"{what}; expected all of it. Run the shorter prompt instead.")
    return before.at(length - prompt + 1)


@dataclass(frozen=True, eq=False)
class Shared:
    """What all gates of a batch share."""

    batch: AnswerBatch
    captured: Captured  # the decoder states that gates read
    vision: Mapping[int, Tensor]  # what the vision blocks that feed the projector wrote, by block

    @cached_property
    def placed(self) -> tuple[TokenMap, Tensor, Tensor]:
        """Tokens, positions and targets of the batch beside the decoder's inputs, moved once for all gates."""
        device, batch = self.captured.given["inputs_embeds"].device, self.batch

        def there(part: Any) -> Any:
            tensors = {k: v for k, v in vars(part).items() if isinstance(v, Tensor)}
            return replace(part, **{k: moved(v, device) for k, v in tensors.items()})

        tokens = replace(there(batch.tokens), vision=there(batch.tokens.vision))
        return tokens, moved(batch.positions, device), moved(batch.targets, device)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a model in evaluation mode until the block ends; then flags and modes are as before."""
    wanted = [(name, p.requires_grad) for name, p in module.named_parameters()]
    try:
        module.requires_grad_(False)
        with evaluated(module):
            yield
    finally:
        now = dict(module.named_parameters())  # those of offloaded parts are made anew at each use
        for name, flag in wanted:
            now[name].requires_grad_(flag)


def share(lvlm: LVLM, batch: AnswerBatch, blocks: Sequence[int], *, whole: bool = False) -> Shared:
    """Run a batch up to the last edited block, without gradient; arguments as in `gate_inputs`."""
    return Shared(batch, *gate_inputs(lvlm, batch.inputs, blocks, whole=whole))


def gate_inputs(
    lvlm: LVLM, inputs: Mapping[str, Any], blocks: Sequence[int], *, whole: bool = False
) -> tuple[Captured, dict[int, Tensor]]:
    """Run the plain model without gradient, and keep what gates read that scale keys in ``blocks``.

    ``whole`` runs the later blocks too, for the losses without a gate. Returns two fields of `Shared`.
    """
    vision: dict[int, Tensor] = {}

    def keep(layer: int, part: nn.Module, args: tuple, output: Any) -> None:
        vision[layer] = vision_states(output)

    with ExitStack() as stack:
        for layer in lvlm.anatomy.reaching:
            part = lvlm.module.get_submodule(lvlm.anatomy.vision.blocks[layer])
            stack.callback(part.register_forward_hook(partial(keep, layer)).remove)
        captured = capture(lvlm, inputs, sorted(set(blocks)), whole=whole)
    return captured, vision


def gate_signals(
    gate: Gate, tokens: TokenMap, vision: Mapping[int, Tensor], state: Tensor
) -> dict[str, Tensor]:
    """Find ``"V"`` and ``"L"`` ``[row pos]`` and the ``"coefficients"`` ``[row group]`` of one gate.

    ``vision`` is that of `gate_inputs`, and ``state`` ``[row pos d_model]`` what the edited block reads.
    """
    notes: dict[str, Any] = {"step": 0, "memory": {}}
    for signal in signals_of(gate, tokens):
        states = vision[signal.site.layer] if signal.site.tower == "vision" else state
        signal.kernel(states, notes, **placed(signal.parameters, states))
    found = notes["memory"][("gate", id(gate))]
    return placed(found, found["coefficients"])


def answer_losses(gates: Sequence[Gate], shared: Shared) -> Losses:
    """Compute the losses of a batch under a stack of gates, with a graph if gradients are on.

    Each gate reads what those before it left. Without gates it is the plain model, shared ``whole``.
    """
    captured, (tokens, positions, targets) = shared.captured, shared.placed
    ordered = sorted(gates, key=lambda gate: gate.config.edited)
    notes: dict[str, Tensor] = {}

    def factors(gate: Gate, state: Tensor) -> Tensor:
        found = gate_signals(gate, tokens, shared.vision, state)
        means = found["coefficients"].detach().mean(dim=0).unbind()
        notes.update(zip([f"rho_{g}" for g in gate.config.groups], means, strict=True))
        visual = (tokens.image >= 0).to(state.device)
        return kernels.factors_of(found, visual, list(gate.config.groups))

    if ordered:
        block = ordered[0].config.edited
        later = {gate.config.edited: partial(factors, gate) for gate in ordered[1:]}
        scale = factors(ordered[0], captured.state(block))
        hidden = resume(captured, block, scale, later=later)
    else:
        hidden = captured.hidden
    scores = TokenScores.of(logits_at(captured, hidden, positions), targets)
    return Losses(scores.loss, shared.batch.answer_tokens, scores.exact, notes)


@dataclass(frozen=True, eq=False)
class GateObjective:
    """Next-token loss of answers under gates, each alone; the model is frozen."""

    lvlm: LVLM
    gates: Mapping[str, Gate]
    data: AnswerData
    append_end: bool

    @cached_property
    def batches(self) -> Batches:
        """The batches; inside of a ``with`` block of them images are opened ahead."""
        return Batches(self.lvlm, self.data, self.append_end)

    def share(self, rows: Sequence[int], then: Any = (), *, whole: bool = False) -> Shared:
        """Compute the batch and the states that gates read; see `share`, and ``then`` in `Objective`."""
        batch = self.batches.of(rows, then)
        return share(self.lvlm, batch, [g.config.edited for g in self.gates.values()], whole=whole)

    def losses(self, shared: Shared, name: str) -> Losses:
        """Compute the losses under one gate."""
        return answer_losses([self.gates[name]], shared)

    def means(
        self, stacks: Sequence[Sequence[Gate]], rows: Sequence[int], batch: int, progress: str = ""
    ) -> list[dict[str, float]]:
        """Compute loss and accuracy under each stack of gates; ``progress`` names a bar, "" shows none."""
        sums, parts = [Sums() for _ in stacks], list(batches_of(rows, batch))
        bar = tqdm(parts, desc=progress, unit="batch", disable=not progress)
        for part, then in zip(bar, [*parts[1:], ()], strict=True):
            shared = self.share(part, then, whole=not all(stacks))
            found = Sums.of([answer_losses(stack, shared) for stack in stacks])
            for total, own in zip(sums, found, strict=True):
                total.merge(own)
        return [total.line() for total in sums]
