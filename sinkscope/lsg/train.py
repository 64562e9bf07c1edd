"""Train gates: next-token loss on answers, the model frozen, all layers in one pass over the data."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.checks import check_flags, check_whole, plain
from sinkscope.data.batches import AnswerData, batches_of, make_batch, read_parts
from sinkscope.detectors.kinds import detector_of
from sinkscope.errors import InputError, ModelError
from sinkscope.files import claim, held
from sinkscope.lsg.building import check_layer
from sinkscope.lsg.cost import TrainingCost, cost_of
from sinkscope.lsg.gate import LSG, check_gates
from sinkscope.lsg.losses import Shared, answer_losses, frozen, share
from sinkscope.lsg.result import TrainResult, own_record, record_of
from sinkscope.models.identity import identity_of
from sinkscope.models.replay import check_replay
from sinkscope.training.loop import Loop, Losses, Sums, Trainee
from sinkscope.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM


def check_place(lvlm: LVLM, accelerator: Any) -> None:
    """Refuse a model that cannot be trained with here."""
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


def wanted_layers(
    lvlm: LVLM, layers: Any, gates: Any, choices: Mapping[str, Any]
) -> list[int | str]:
    """The layers of new gates, none if ``gates`` are given, which have made their ``choices``."""
    if isinstance(gates, LSG):
        raise InputError("Got one gate; expected a list. Write gates=[gate].")
    if layers is None:
        layers = () if gates else ["embed", *range(lvlm.anatomy.language.n_layers - 1)]
    if isinstance(layers, (int, str)):
        raise InputError(f"Got layers={layers!r}; expected a list. Write layers=[{layers!r}].")
    wanted = [plain(layer) for layer in layers]
    if bool(wanted) == bool(gates):
        raise InputError(
            f"Got layers={wanted} and {len(gates)} gates; expected either. Write layers=[10] for a new "
            "gate, or gates=[gate] to train on."
        )
    for layer in wanted:
        check_layer(layer, lvlm.anatomy.language.n_layers)
    given = [name for name, value in choices.items() if value is not None]
    if gates and given:
        raise InputError(
            f"Got gates together with {given}; expected either: a gate brings its own groups and rules. "
            "Write layers=[...] for new gates."
        )
    every = wanted or [gate.layer for gate in check_gates(gates)]
    if len(set(every)) != len(every):
        raise InputError(f"Got the layers {every}; expected every layer once.")
    for gate in gates:
        gate.check_fits(lvlm)
    return wanted


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

    Every layer's gate is a run of its own, as if it were trained alone; what lies below the gates is
    computed once for all. A gate reads the last prompt token, and its coefficients hold for the
    answer. The paper publishes two epochs and no other setting: see `TrainingSettings` for what is ours.

    Args:
        lvlm: The model; it is bitwise as it was afterwards, also after an error.
        dataset: Records with image (or a list of images), question, answer and, if you like,
            image_id; see `sinkscope.data.batches.read_dataset`.
        layers: Blocks that gates read, one gate each; or ``"embed"``; None for all of both.
        settings: The numbers of the run; or write its fields, ``epochs`` to ``seed``, as arguments.
        gates: Instead of layers, gates of different layers to start from. They are copied.
        choices: Fields of `GateConfig` for new gates, such as ``{"groups": ("V", "L", "rest")}``.
        v_detector: See `LSG.for_model`, as for ``l_detector`` and ``samples``.
        l_detector: The rule for L-sinks.
        samples: What to calibrate rules on.
        validation: Share of the images to hold out. 0 trains on all, and keeps the last weights.
        validation_data: Instead of a share, records to validate on.
        epochs: Passes over the data. For this and all up to ``seed``, None is the default of
            `TrainingSettings`, which says more.
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
    settings = TrainingSettings.of(settings, locals())
    check_flags(append_end=append_end, dry_run=dry_run)
    check_whole(1, checkpoint_every=checkpoint_every)
    if not dry_run:
        check_place(lvlm, accelerator)
    rules = {"v_detector": v_detector, "l_detector": l_detector, "samples": samples}
    wanted = wanted_layers(lvlm, layers, gates, {"choices": choices, **rules})
    if settings.patience and not validation and validation_data is None:
        raise InputError(
            f"Got patience={settings.patience} and validation={validation}; expected some validation "
            "data to stop early by. Write validation=0.1, or patience=0."
        )
    split = {"validation": validation, "seed": settings.seed, "progress": progress}
    data, rows, tested = read_parts(
        lvlm, dataset, validation_data, max_answer_tokens=max_answer_tokens, **split
    )
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
    made |= new_gates(lvlm, wanted, {"seed": settings.seed, **(choices or {})}, rules)
    by_name = {str(layer): gate for layer, gate in made.items()}
    objective = GateObjective(lvlm, by_name, data, append_end)
    steps = {"rows": settings.batch * settings.accumulate * count, "all": cost.steps}
    facts = facts_of(objective, {"train": rows, "validation": tested}, settings, steps)
    shown = len(data) >= 50 if progress is None else progress
    folder = None if out is None else Path(out)
    with ExitStack() as stack:
        if folder is not None and (accelerator is None or accelerator.is_main_process):
            claim(folder, "run.json", facts, "run")
            stack.enter_context(held(folder, "run"))
        if accelerator is not None:
            accelerator.wait_for_everyone()
        stack.enter_context(frozen(lvlm.module))
        stack.enter_context(torch.enable_grad())
        base = objective.base(tested, settings.batch) if tested else None
        run = (objective.trainees, objective, rows, tested, settings)
        loop = Loop(*run, folder, checkpoint_every, shown, accelerator)
        loop.run()
    record = record_of(lvlm.name, facts, cost.to_dict(), loop, base)
    for layer, gate in made.items():
        gate.record = own_record(record, layer)
    return TrainResult(made, record, loop.history)


@dataclass(frozen=True, eq=False)
class GateObjective:
    """Next-token loss of answers under gates, each alone.

    Attributes:
        lvlm: The model, frozen.
        gates: By name.
        data: The records.
        append_end: See `train_lsg`.
    """

    lvlm: LVLM
    gates: Mapping[str, LSG]
    data: AnswerData
    append_end: bool

    @property
    def trainees(self) -> list[Trainee]:
        """The gates, as what the loop trains."""
        return [Trainee(name, dict(gate.named_parameters())) for name, gate in self.gates.items()]

    def share(self, rows: Sequence[int], *, whole: bool = False) -> Shared:
        """The batch and the states that gates read; see `sinkscope.lsg.losses.share`."""
        batch = make_batch(self.lvlm, self.data, rows, append_end=self.append_end)
        blocks = [gate.config.edited for gate in self.gates.values()]
        return share(self.lvlm, batch, blocks, whole=whole)

    def losses(self, shared: Shared, name: str) -> Losses:
        """The losses under one gate."""
        return answer_losses([self.gates[name]], shared)

    @torch.no_grad()
    def base(self, rows: Sequence[int], batch: int) -> dict[str, float]:
        """Loss and accuracy of the model without a gate."""
        sums = Sums()
        for part in batches_of(rows, batch):
            sums.add(answer_losses([], self.share(part, whole=True)))
        return sums.line()


def new_gates(
    lvlm: LVLM, layers: Sequence[int | str], choices: Mapping[str, Any], rules: Mapping[str, Any]
) -> dict[int | str, LSG]:
    """Untrained gates that share their rules, so that there is one calibration at most."""
    out: dict[int | str, LSG] = {}
    known = dict(rules)
    for layer in layers:
        out[layer] = LSG.for_model(lvlm, layer, **known, **choices)
        for name in ("v_detector", "l_detector"):
            rule = getattr(out[layer].config, name)
            known[name] = None if rule is None else detector_of(rule)
    return out


def facts_of(
    objective: GateObjective,
    parts: Mapping[str, Sequence[int]],
    settings: TrainingSettings,
    steps: Mapping[str, int],
) -> dict[str, Any]:
    """What a run is started with, as plain data: a run that goes on must have the same."""
    data = objective.data
    images = {name: {data.images[row] for row in rows} for name, rows in parts.items()}
    return {
        "model": identity_of(objective.lvlm),
        "settings": {**settings.to_dict(), "append_end": objective.append_end},
        "data": {
            "fingerprint": data.fingerprint,
            **{n: {"records": len(parts[n]), "images": len(images[n])} for n in parts},
        },
        "steps": dict(steps),
        "gates": {name: described(gate) for name, gate in objective.gates.items()},
    }


def described(gate: LSG) -> dict[str, Any]:
    """A gate's choices, and a digest of the weights it starts from."""
    digest = hashlib.blake2b(digest_size=8)
    for value in gate.state_dict().values():
        digest.update(value.detach().cpu().numpy().tobytes())
    return {**gate.config.to_dict(), "start": digest.hexdigest()}
