"""What training will cost, in passes of one block over one batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.checks import check_flags, check_whole
from sinkscope.data.batches import AnswerData, batches_of, make_batch, read_parts
from sinkscope.errors import InputError, InterventionError, ModelError
from sinkscope.files import held
from sinkscope.lsg.building import check_layer
from sinkscope.lsg.config import detector_of
from sinkscope.lsg.gate import LSG, check_gates
from sinkscope.lsg.losses import Losses, Shared, answer_losses, frozen, share
from sinkscope.lsg.result import TrainResult, own_record, record_of
from sinkscope.models.identity import identity_of
from sinkscope.models.replay import prove
from sinkscope.training.loop import Loop, Sums, Trainee, open_run
from sinkscope.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM


@dataclass(frozen=True)
class TrainingCost:
    """What training will cost.

    A block that carries a gradient is run forward and, for the gradient of what it reads, backward;
    its weights get none. Both count as one pass each.

    Attributes:
        steps: Steps of the optimiser.
        batches: Forward batches of training.
        looks: Looks at the validation part, the first before training.
        held_batches: Batches of each look.
        vision_blocks: Vision blocks per batch, without gradient.
        plain_blocks: Decoder blocks per batch without gradient, shared by all gates.
        gate_blocks: Decoder blocks per batch with gradient, of each gate.
        alone_blocks: Plain decoder blocks per batch, of each gate if it were trained alone.
        decoder_blocks: Blocks of the decoder, which the plain model runs once per validation batch.
    """

    steps: int
    batches: int
    looks: int
    held_batches: int
    vision_blocks: int
    plain_blocks: int
    gate_blocks: tuple[int, ...]
    alone_blocks: tuple[int, ...]
    decoder_blocks: int

    @property
    def together(self) -> int:
        """Decoder passes of one training batch, all gates together."""
        return self.plain_blocks + 2 * sum(self.gate_blocks)

    @property
    def apart(self) -> int:
        """Decoder passes of one training batch of every gate, each trained alone."""
        return sum(self.alone_blocks) + 2 * sum(self.gate_blocks)

    @property
    def bound(self) -> float:
        """How many times cheaper all gates together are than apart, counting decoder blocks.

        For a gate at every layer of a deep decoder it tends to 1.5: alone, each costs half of its
        forward pass without and one and a half with a gradient.
        """
        return self.apart / self.together

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"together": self.together, "apart": self.apart, "bound": self.bound}

    def __str__(self) -> str:
        seen, held = self.batches, self.looks * self.held_batches
        plain = self.held_batches if self.looks else 0
        blocks = (self.plain_blocks + sum(self.gate_blocks)) * held + self.decoder_blocks * plain
        return "\n".join(
            [
                f"{self.steps} steps, {seen} training batches; {self.looks} looks at "
                f"{self.held_batches} validation batches.",
                f"Training batch: {self.vision_blocks} vision blocks and {self.plain_blocks} decoder "
                f"blocks without gradient, then {sum(self.gate_blocks)} decoder blocks forward and "
                f"backward for {len(self.gate_blocks)} gates.",
                f"Together {self.together * seen} decoder block passes; trained one by one "
                f"{self.apart * seen} ({self.bound:.2f} times as many).",
                f"Validation, and the plain model on it, add {blocks} decoder block passes and "
                f"{self.vision_blocks * (held + plain)} of the vision tower, without gradient.",
            ]
        )


def cost_of(
    settings: TrainingSettings,
    edited: Sequence[int],
    rows: int,
    held: int,
    vision_blocks: int,
    decoder_blocks: int,
    processes: int = 1,
) -> TrainingCost:
    """The cost of a run without an early end, per process.

    Args:
        settings: How it is trained.
        edited: The block whose keys each gate scales.
        rows: Training records.
        held: Validation records.
        vision_blocks: Blocks of the vision tower.
        decoder_blocks: Blocks of the decoder.
        processes: Processes that share the rows.
    """
    own, own_held = -(-rows // processes), -(-held // processes)
    per_epoch = -(-rows // (settings.batch * settings.accumulate * processes))
    steps = per_epoch * settings.epochs
    looks = 1 + -(-steps // (settings.evaluate_every or per_epoch))
    return TrainingCost(
        steps=steps,
        batches=-(-own // settings.batch) * settings.epochs,
        looks=looks if held else 0,
        held_batches=-(-own_held // settings.batch),
        vision_blocks=vision_blocks,
        plain_blocks=max(edited),
        gate_blocks=tuple(decoder_blocks - block for block in edited),
        alone_blocks=tuple(edited),
        decoder_blocks=decoder_blocks,
    )


def check_place(lvlm: LVLM, accelerator: Any) -> None:
    """Refuse a model that cannot be trained with here.

    Raises:
        ModelError: If its weights are not here, or on another device than the process works on.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "Got torch.inference_mode(), in which nothing can be trained; expected to be outside of it. "
            "Leave that block; the model itself gets no gradient anyway."
        )
    if lvlm.device.type == "meta":
        raise ModelError(
            "Got a model without weights here; expected one to compute gradients with. Write "
            "ss.LVLM.from_pretrained(name) without remote=True."
        )
    if accelerator is None or accelerator.num_processes == 1:
        return
    here, there = lvlm.device, accelerator.device
    if here.type != there.type or (here.type != "cpu" and (here.index or 0) != (there.index or 0)):
        raise ModelError(
            f"Got a model on {here} in process {accelerator.process_index} of "
            f"{accelerator.num_processes}, whose device is {there}; expected it there. "
            "Write ss.LVLM.from_pretrained(name, device_map={'': accelerator.device})."
        )


def wanted_layers(lvlm: LVLM, layers: Any, gates: Any) -> list[int | str]:
    """The layers as a list; None is all of them.

    Raises:
        InputError: If they are one layer and no list.
    """
    if layers is None:
        return [] if gates else ["embed", *range(lvlm.anatomy.language.n_layers - 1)]
    if isinstance(layers, (int, str)):
        raise InputError(f"Got layers={layers!r}; expected a list. Write layers=[{layers!r}].")
    return [layer if isinstance(layer, str) else int(layer) for layer in layers]


def check_beside(gates: Any, *others: Any) -> None:
    """Refuse choices for gates that have made theirs.

    Raises:
        InputError: If there are any.
    """
    names = ("choices", "v_detector", "l_detector", "samples")
    given = [name for name, value in zip(names, others, strict=True) if value is not None]
    if gates and given:
        raise InputError(
            f"Got gates together with {given}; expected either: a gate brings its own groups and rules. "
            "Write layers=[...] for new gates."
        )


def check_wanted(lvlm: LVLM, layers: Any, gates: Any) -> None:
    """Check which gates to train.

    Raises:
        InputError: If there are none, both or one layer twice.
        LayerError: If there is no such layer.
        InterventionError: If a gate is none, or of another model.
    """
    if isinstance(gates, LSG):
        raise InputError("Got one gate; expected a list. Write gates=[gate].")
    if bool(layers) == bool(gates):
        raise InputError(
            f"Got layers={list(layers)} and {len(gates)} gates; expected either. Write layers=[10] "
            "for a new gate, or gates=[gate] to train on."
        )
    for layer in layers:
        check_layer(layer, lvlm.anatomy.language.n_layers)
    found = list(layers) or [gate.layer for gate in check_gates(gates)]
    if len(set(found)) != len(found):
        raise InputError(f"Got the layers {found}; expected every layer once.")
    for gate in gates:
        if not isinstance(gate, LSG):
            raise InterventionError(f"Got {gate!r} among the gates; expected LSG.")
        gate.check_fits(lvlm)


def check_numbers(patience: int, validation: float, checkpoint_every: Any) -> None:
    """Check what belongs together.

    Raises:
        InputError: If early stopping is wanted without validation, or checkpoints never.
    """
    if patience and not validation:
        raise InputError(
            f"Got patience={patience} and validation={validation}; expected some validation data to "
            "stop early by. Write validation=0.1, or patience=0."
        )
    check_whole(1, checkpoint_every=checkpoint_every)


Gates = dict[int | str, LSG]


def train_lsg(
    lvlm: LVLM,
    dataset: Iterable[Any],
    layers: Sequence[int | str] | None = (),
    *,
    gates: Sequence[LSG] = (),
    choices: Mapping[str, Any] | None = None,
    v_detector: Any = None,
    l_detector: Any = None,
    samples: Sequence[Sample] | None = None,
    validation: float = 0.1,
    validation_data: Iterable[Any] | None = None,
    epochs: int = 2,
    batch: int = 8,
    accumulate: int = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    schedule: str = "cosine",
    warmup: float = 0.03,
    clip: float = 1.0,
    evaluate_every: int = 0,
    patience: int = 0,
    seed: int = 0,
    append_end: bool = True,
    max_answer_tokens: int = 256,
    out: str | Path | None = None,
    checkpoint_every: int = 100,
    accelerator: Accelerator | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
) -> TrainResult | TrainingCost:
    """Train Layer-wise Sink Gates: next-token loss on the answers, the model frozen (2604.03316).

    Every layer's gate is a run of its own, as if it were trained alone; what lies below the gates is
    computed once for all. A gate reads the last prompt token, and its coefficients hold for the
    answer. The paper publishes two epochs and no other setting: see `TrainingSettings` for what is ours.

    Args:
        lvlm: The model; it is bitwise as it was afterwards, also after an error.
        dataset: Records with image (or a list of images), question, answer and, if you like,
            image_id; see `sinkscope.data.batches.read_dataset`.
        layers: Blocks that gates read, one gate each; or ``"embed"``; None for all of both.
        gates: Instead of layers, gates of different layers to start from. They are copied.
        choices: Fields of `GateConfig` for new gates, such as ``{"groups": ("V", "L", "rest")}``.
        v_detector: See `LSG.for_model`.
        l_detector: See `LSG.for_model`.
        samples: See `LSG.for_model`.
        validation: Share of the images to hold out. 0 trains on all, and keeps the last weights.
        validation_data: Instead of a share, records to validate on.
        epochs: Passes over the data. More on this and all settings up to ``seed``: `TrainingSettings`.
        batch: Rows per forward pass.
        accumulate: Forward passes per step.
        lr: Highest learning rate.
        weight_decay: Of AdamW.
        schedule: ``"cosine"`` or ``"constant"``.
        warmup: Share of the steps.
        clip: Longest gradient; 0 for no limit.
        evaluate_every: Steps between validations; 0 for once an epoch.
        patience: Validations without a lower loss before a gate's run ends; 0 for never.
        seed: Of the gates' weights, the split and the order. On a CPU it repeats a run bitwise.
        append_end: Whether the token that ends an answer is trained too.
        max_answer_tokens: The longest answer that is accepted.
        out: A folder for checkpoints. Called again with the same settings and data, training goes
            on where it was killed and ends at the same weights.
        checkpoint_every: Steps between checkpoints.
        accelerator: Processes of ``accelerate`` that share each step's rows; every one holds the
            whole model on its own device. None trains in this process.
        progress: Whether to show progress bars; None shows them from 50 records on.
        dry_run: Whether to return what training would cost instead; the model does not run.

    Returns:
        The gates with the weights of the lowest validation loss, the history and a record; or, with
        ``dry_run``, a `TrainingCost` to print.

    Raises:
        InputError: If the data, a setting or the folder does not fit.
        LayerError: If there is no such layer.
        InterventionError: If a gate was made for another model.
        NonFiniteError: If a loss or gradient of every gate is NaN or infinite, with the step. Of some
            only: those end with a warning, their record says why, and the others go on.
    """
    settings = TrainingSettings(
        epochs,
        batch,
        accumulate,
        lr,
        weight_decay,
        schedule,
        warmup,
        clip,
        evaluate_every,
        patience,
        seed,
    )
    check_flags(append_end=append_end, dry_run=dry_run)
    if not dry_run:
        check_place(lvlm, accelerator)
    layers = wanted_layers(lvlm, layers, gates)
    check_wanted(lvlm, layers, gates)
    check_beside(gates, choices, v_detector, l_detector, samples)
    held_out = validation if validation_data is None else 1.0
    check_numbers(patience, held_out, checkpoint_every)
    parts = {"validation": validation, "seed": seed, "max_answer_tokens": max_answer_tokens}
    data, rows, held_rows = read_parts(lvlm, dataset, validation_data, progress=progress, **parts)
    count = 1 if accelerator is None else accelerator.num_processes
    edited = [gate.config.edited for gate in gates] or [edited_by(layer) for layer in layers]
    towers = (lvlm.anatomy.vision.n_layers, lvlm.anatomy.language.n_layers)
    cost = cost_of(settings, edited, len(rows), len(held_rows), *towers, processes=count)
    if dry_run:
        return cost
    facts = facts_of(lvlm, data, (rows, held_rows), settings, append_end)
    facts["steps"] = {"rows": settings.batch * settings.accumulate * count, "all": cost.steps}
    with frozen(lvlm.module):
        prove(lvlm, make_batch(lvlm, data, rows[:1]).inputs)
    if gates:
        made: Gates = {gate.layer: copy.deepcopy(gate) for gate in gates}
    else:
        rules = {"v_detector": v_detector, "l_detector": l_detector, "samples": samples}
        made = new_gates(lvlm, layers, {"seed": seed, **(choices or {})}, rules)
    facts["gates"] = {str(layer): described(gate) for layer, gate in made.items()}
    folder = None if out is None else Path(out)
    with ExitStack() as stack:
        if folder is not None and (accelerator is None or accelerator.is_main_process):
            open_run(folder, facts)
            stack.enter_context(held(folder, "run"))
        if accelerator is not None:
            accelerator.wait_for_everyone()
        stack.enter_context(frozen(lvlm.module))
        stack.enter_context(torch.enable_grad())
        objective = GateObjective(lvlm, made, data, append_end)
        base = base_losses(objective, held_rows, settings.batch) if held_rows else None
        loop = Loop(
            objective.trainees,
            objective,
            rows,
            held_rows,
            settings,
            folder,
            checkpoint_every,
            len(data) >= 50 if progress is None else progress,
            accelerator,
        )
        loop.run()
    record = record_of(lvlm.name, facts, cost, loop, base)
    for layer, gate in made.items():
        gate.record = own_record(record, layer)
    return TrainResult(made, record, loop.history)


class GateObjective:
    """Next-token loss of answers under gates, each alone.

    Args:
        lvlm: The model, frozen.
        gates: By layer.
        data: The records.
        append_end: See `train_lsg`.
    """

    def __init__(
        self, lvlm: LVLM, gates: Mapping[int | str, LSG], data: AnswerData, append_end: bool
    ) -> None:
        self.lvlm, self.data, self.append_end = lvlm, data, append_end
        self.gates = {str(layer): gate for layer, gate in gates.items()}
        self.blocks = [gate.config.edited for gate in gates.values()]

    @property
    def trainees(self) -> list[Trainee]:
        """The gates, as what the loop trains."""
        return [Trainee(name, dict(gate.named_parameters())) for name, gate in self.gates.items()]

    def share(self, rows: Sequence[int], *, whole: bool = False) -> Shared:
        """The batch and the states that gates read; see `sinkscope.lsg.losses.share`."""
        batch = make_batch(self.lvlm, self.data, rows, append_end=self.append_end)
        return share(self.lvlm, batch, self.blocks, whole=whole)

    def losses(self, shared: Shared, name: str) -> Losses:
        """The losses under one gate."""
        return answer_losses([self.gates[name]], shared)


@torch.no_grad()
def base_losses(objective: GateObjective, rows: Sequence[int], batch: int) -> dict[str, float]:
    """Loss and accuracy of the model without a gate.

    Args:
        objective: The objective.
        rows: Indices of records.
        batch: Rows per forward pass.
    """
    sums = Sums()
    for part in batches_of(rows, batch):
        sums.add(answer_losses([], objective.share(part, whole=True)))
    return sums.line()


def new_gates(
    lvlm: LVLM,
    layers: Sequence[int | str],
    choices: Mapping[str, Any],
    rules: Mapping[str, Any],
) -> Gates:
    """Untrained gates that share their detectors, so that there is one calibration at most.

    Args:
        lvlm: The model.
        layers: One gate each.
        choices: Fields of `GateConfig`.
        rules: ``v_detector``, ``l_detector`` and ``samples`` of `LSG.for_model`.
    """
    out: Gates = {}
    known = dict(rules)
    for layer in layers:
        gate = LSG.for_model(lvlm, layer, **known, **choices)
        config, out[layer] = gate.config, gate
        known = {"v_detector": detector_of(config.v_detector), "l_detector": None}
        if config.l_detector is not None:
            known["l_detector"] = detector_of(config.l_detector)
    return out


def facts_of(
    lvlm: LVLM,
    data: AnswerData,
    parts: tuple[Sequence[int], Sequence[int]],
    settings: TrainingSettings,
    append_end: bool,
) -> dict[str, Any]:
    """What a run is started with, as plain data: a run that goes on must have the same."""
    rows, held = parts
    names = [len({data.images[i] for i in part}) for part in parts]
    return {
        "model": identity_of(lvlm),
        "settings": {**settings.to_dict(), "append_end": append_end},
        "data": {
            "fingerprint": data.fingerprint,
            "train": {"records": len(rows), "images": names[0]},
            "validation": {"records": len(held), "images": names[1]},
        },
    }


def described(gate: LSG) -> dict[str, Any]:
    """A gate's choices, and a digest of the weights it starts from."""
    digest = hashlib.blake2b(digest_size=8)
    for value in gate.state_dict().values():
        digest.update(value.detach().cpu().numpy().tobytes())
    return {**gate.config.to_dict(), "start": digest.hexdigest()}


def edited_by(layer: int | str) -> int:
    """The block whose keys a gate at a layer scales."""
    return 0 if isinstance(layer, str) else layer + 1
