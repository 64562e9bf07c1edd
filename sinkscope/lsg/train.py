"""Train gates: next-token loss on answers, the model frozen, all layers in one pass over the data."""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sinkscope.anatomy.weights import check_graph
from sinkscope.checks import check_whole, typed
from sinkscope.data.batches import make_batch, read_parts
from sinkscope.detectors.choice import detector_of
from sinkscope.detectors.detection import check_rules
from sinkscope.errors import InputError, ModelError
from sinkscope.files import claim, held
from sinkscope.lsg.config import check_layer
from sinkscope.lsg.gate import LSG, check_gates
from sinkscope.lsg.passes import GateObjective, frozen
from sinkscope.lsg.result import TrainResult, own_record, record_of
from sinkscope.models.inputs import Sample
from sinkscope.models.loading import identity_of
from sinkscope.models.lvlm import LVLM
from sinkscope.models.replay import check_replay
from sinkscope.training import TrainingSettings
from sinkscope.training.loop import Loop, Trainee


@dataclass(frozen=True)
class TrainingCost:
    """What training will cost, in passes of one block over one batch; with a gradient there are two."""

    steps: int
    batches: int
    looks: int  # validations, the first before training, of ``held_batches`` each
    held_batches: int
    vision_blocks: int  # vision blocks per batch, without gradient
    plain_blocks: int  # decoder blocks per batch without gradient, shared by all gates
    gate_blocks: tuple[int, ...]  # decoder blocks per batch with gradient, of each gate
    alone_blocks: tuple[int, ...]  # plain decoder blocks per batch, of each gate if trained alone
    decoder_blocks: int  # of the decoder, which the plain model runs once per validation batch

    @property
    def together(self) -> int:
        """Decoder passes of one training batch with all gates together."""
        return self.plain_blocks + 2 * sum(self.gate_blocks)

    @property
    def apart(self) -> int:
        """Decoder passes of one training batch of every gate, each trained alone."""
        return sum(self.alone_blocks) + 2 * sum(self.gate_blocks)

    @property
    def bound(self) -> float:
        """``apart / together``; for a gate at every layer of a deep decoder it tends to 1.5."""
        return self.apart / self.together

    def to_dict(self) -> dict[str, Any]:
        """Give the cost as plain data."""
        return asdict(self) | {"together": self.together, "apart": self.apart, "bound": self.bound}

    def __str__(self) -> str:
        seen, held, graph = self.batches, self.looks * self.held_batches, sum(self.gate_blocks)
        plain = self.held_batches if self.looks else 0
        blocks = (self.plain_blocks + graph) * held + self.decoder_blocks * plain
        return (
            f"{self.steps} steps, {seen} training batches; {self.looks} looks at "
            f"{self.held_batches} validation batches.\n"
            f"Training batch: {self.vision_blocks} vision blocks and {self.plain_blocks} decoder "
            f"blocks without gradient, then {graph} decoder blocks forward and backward for "
            f"{len(self.gate_blocks)} gates.\n"
            f"Together {self.together * seen} decoder block passes; trained one by one "
            f"{self.apart * seen} ({self.bound:.2f} times as many).\n"
            f"Validation, and the plain model on it, add {blocks} decoder block passes and "
            f"{self.vision_blocks * (held + plain)} of the vision tower, without gradient."
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
    """Count a run without an early end, per process; gates scale the keys of the ``edited`` blocks."""
    own, own_held = (-(-many // (processes * settings.batch)) for many in (rows, held))
    per_epoch = settings.per_epoch(rows, processes)
    steps = per_epoch * settings.epochs
    return TrainingCost(
        steps=steps,
        batches=own * settings.epochs,
        looks=1 + -(-steps // (settings.evaluate_every or per_epoch)) if held else 0,
        held_batches=own_held,
        vision_blocks=vision_blocks,
        plain_blocks=max(edited),
        gate_blocks=tuple(decoder_blocks - block for block in edited),
        alone_blocks=tuple(edited),
        decoder_blocks=decoder_blocks,
    )


def check_place(lvlm: LVLM, accelerator: Any) -> None:
    """Refuse a model that cannot be trained with here."""
    if torch.is_inference_mode_enabled():
        raise ModelError("Got torch.inference_mode(); expected to be outside of it: leave it.")
    if lvlm.device.type == "meta":
        what = "Got a model without weights here; expected one to compute gradients with."
        raise ModelError(f"{what} Write ss.LVLM.from_pretrained(name) without remote=True.")
    check_graph(lvlm.module)
    if accelerator is None or accelerator.num_processes == 1:
        return
    here, there = lvlm.device, accelerator.device  # "cuda" is "cuda:0"
    if here.type != there.type or (here.type != "cpu" and (here.index or 0) != (there.index or 0)):
        where = f"process {accelerator.process_index} of {accelerator.num_processes}"
        raise ModelError(
            f"Got a model on {here} in {where}, whose device is {there}; expected it there. Write "
            "ss.LVLM.from_pretrained(name, device_map={'': accelerator.device})."
        )


def wanted_layers(
    lvlm: LVLM, layers: Any, gates: Any, choices: Mapping[str, Any]
) -> list[int | str]:
    """The layers of new gates, none if ``gates`` are given, which bring their own ``choices``."""
    if isinstance(gates, LSG):
        raise InputError("Got one gate; expected a list. Write gates=[gate].")
    if isinstance(layers, (int, str)):
        raise InputError(f"Got layers={layers!r}; expected a list. Write layers=[{layers!r}].")
    many = lvlm.anatomy.language.n_layers
    every = () if gates else ("embed", *range(many - 1))
    wanted = [check_layer(one, many) for one in (every if layers is None else layers)]
    if bool(wanted) == bool(gates):
        what = f"Got layers={wanted} and {len(gates)} gates; expected either."
        raise InputError(f"{what} Write layers=[10] for a new gate, or gates=[gate] to train on.")
    given = [name for name, value in choices.items() if value is not None]
    if gates and given:
        what = f"Got gates together with {given}; expected either: a gate has its own rules."
        raise InputError(f"{what} Write layers=[...] for new gates.")
    used = wanted or [gate.layer for gate in check_gates(gates)]
    if len(set(used)) < len(used):
        raise InputError(f"Got the layers {used}; expected every layer once.")
    for gate in gates:
        gate.check_fits(lvlm)
    return wanted


@typed
def train_lsg(
    lvlm: LVLM,
    dataset: Iterable[Any],
    layers: Sequence[int | str] | None = (),
    *,
    settings: TrainingSettings | None = None,
    gates: Sequence[LSG] = (),
    choices: Mapping[str, Any] | None = None,
    v_detector: Any = None,
    l_detector: Any = None,
    samples: Sequence[Sample] | None = None,
    validation: float = 0.1,
    validation_data: Iterable[Any] | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    accumulate: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    schedule: str | None = None,
    warmup: float | None = None,
    clip: float | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    seed: int | None = None,
    append_end: bool = True,
    max_answer_tokens: int = 256,
    out: str | Path | None = None,
    checkpoint_every: int = 100,
    accelerator: Accelerator | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
) -> TrainResult | TrainingCost:
    """Train Layer-wise Sink Gates: next-token loss on the answers, the model frozen (2604.03316).

    Every layer's gate is trained as if it were alone; the blocks before the gates are computed once for
    all. A gate reads the last prompt token, and its coefficients hold for the answer. ``epochs`` to
    ``seed`` are fields of `TrainingSettings`, written here instead of ``settings``. The result has the gates
    with the weights of the lowest validation loss, the history and a record.

    InputError if the data, a setting or the folder does not fit; CheckpointError if the folder cannot be
    written or its checkpoint was damaged. A gate whose loss or gradient is NaN or
    infinite ends with a warning, and the others continue; NonFiniteError if none is left.

    Args:
        lvlm: The model; afterwards, also after an error, it is bitwise as it was.
        dataset: Records as `sinkscope.data.batches.read_dataset` takes them.
        layers: Blocks that gates read, one gate each; or ``"embed"``; None for all of both.
        gates: Instead of layers, gates of different layers to start from. They are copied.
        choices: Fields of `GateConfig` for new gates, such as ``{"groups": ("V", "L", "rest")}``.
        v_detector: See `LSG.for_model`, as for ``l_detector`` and ``samples``.
        validation: Share of the images to hold out. 0 trains on all, and keeps the last weights.
        validation_data: Instead of a share, records to validate on.
        seed: Of the gates' weights, the split and the order; on a CPU runs of one seed are bitwise equal.
        append_end: Whether the token that ends an answer is trained too.
        out: A folder for a checkpoint every ``checkpoint_every`` steps. Called again with the same
            settings and data, training continues where it was killed and ends at the same weights.
        accelerator: Processes of ``accelerate`` that share each step's rows, each with the whole model.
        progress: Whether to show progress bars; None shows them from 50 records on.
        dry_run: Whether to return a `TrainingCost` instead; the model does not run.
    """
    settings = TrainingSettings.of(settings, locals())
    check_whole(1, checkpoint_every=checkpoint_every)
    if not dry_run:
        check_place(lvlm, accelerator)
    check_rules(v_detector, l_detector)
    rules = {"v_detector": v_detector, "l_detector": l_detector, "samples": samples}
    wanted = wanted_layers(lvlm, layers, gates, {"choices": choices, **rules})
    if settings.patience and not validation and validation_data is None:
        what = f"Got patience={settings.patience} and validation={validation}"
        raise InputError(f"{what}; expected validation data. Write validation=0.1, or patience=0.")
    limits: dict[str, Any] = {"max_answer_tokens": max_answer_tokens, "progress": progress}
    limits |= {"validation": validation, "seed": settings.seed}
    data, rows, tested = read_parts(lvlm, dataset, validation_data, **limits)
    count = 1 if accelerator is None else accelerator.num_processes
    edited = [gate.config.edited for gate in gates]
    edited += [0 if isinstance(layer, str) else layer + 1 for layer in wanted]
    towers = (lvlm.anatomy.vision.n_layers, lvlm.anatomy.language.n_layers)
    cost = cost_of(settings, edited, len(rows), len(tested), *towers, processes=count)
    if dry_run:
        return cost
    with frozen(lvlm.module):
        check_replay(lvlm, make_batch(lvlm, data, rows[:1]).inputs, edited)
    made: dict[int | str, LSG] = {gate.layer: copy.deepcopy(gate) for gate in gates}
    for layer in wanted:
        own = {"seed": settings.seed, **(choices or {})}
        made[layer] = gate = LSG.for_model(lvlm, layer, **rules, **own)
        for name in ("v_detector", "l_detector"):  # of the first gate: calibrated once at most
            rule = getattr(gate.config, name)
            rules[name] = rule and detector_of(rule)
    by_name = {str(layer): gate for layer, gate in made.items()}
    objective = GateObjective(lvlm, by_name, data, append_end)
    facts = facts_of(objective, {"train": rows, "validation": tested}, settings)
    facts["steps"] = {"rows": settings.batch * settings.accumulate * count, "all": cost.steps}
    shown = len(data) >= 50 if progress is None else progress
    folder = None if out is None else Path(out)
    trainees = [Trainee(name, dict(gate.named_parameters())) for name, gate in by_name.items()]
    how = (settings, folder, checkpoint_every, shown, accelerator, facts)
    loop = Loop(trainees, objective, rows, tested, *how)
    with ExitStack() as stack:
        if folder is not None and (accelerator is None or accelerator.is_main_process):
            claim(folder, "run.json", facts, "run")
            if not loop.resume():  # a finished run is only read
                stack.enter_context(held(folder, "run"))
        if accelerator is not None:
            accelerator.wait_for_everyone()
        stack.enter_context(frozen(lvlm.module))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(objective.batches)
        base = objective.means([[]], tested, settings.batch)[0] if tested else None
        loop.run()
    record = record_of(lvlm.name, facts, cost.to_dict(), loop, base)
    for layer, gate in made.items():
        gate.record = own_record(record, layer)
    return TrainResult(made, record, loop.history)


def facts_of(
    objective: GateObjective, parts: Mapping[str, Sequence[int]], settings: TrainingSettings
) -> dict[str, Any]:
    """What a run is started with, as plain data: a run that continues must have the same."""
    data, gates = objective.data, {}
    for name, gate in objective.gates.items():
        weights = b"".join(v.cpu().numpy().tobytes() for v in gate.state_dict().values())
        start = hashlib.blake2b(weights, digest_size=8).hexdigest()
        gates[name] = {**gate.config.to_dict(), "start": start}
    counts = {
        name: {"records": len(rows), "images": len({data.images[row] for row in rows})}
        for name, rows in parts.items()
    }
    return {
        "model": identity_of(objective.lvlm),
        "settings": {**settings.to_dict(), "append_end": objective.append_end},
        "data": {"fingerprint": data.fingerprint, **counts},
        "gates": gates,
    }
