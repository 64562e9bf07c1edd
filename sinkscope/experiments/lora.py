"""What a LoRA is trained for, in the loop that trains gates: the same loss on the same batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinkscope.data.batches import AnswerBatch, AnswerData, make_batch, read_dataset
from sinkscope.errors import InputError, LayerError, ModelError, nearest
from sinkscope.lsg.losses import Losses, frozen, score
from sinkscope.models.wrapping import undisturbed
from sinkscope.training.loop import Loop, Trainee
from sinkscope.training.settings import TrainingSettings

if TYPE_CHECKING:
    from sinkscope.lsg import LSG
    from sinkscope.models.lvlm import LVLM

NAME = "LoRA"


class WholeObjective:
    """Next-token loss of the answers under the whole model, as it is now.

    Args:
        lvlm: The model; what is trained is part of its forward pass.
        data: The records.
    """

    def __init__(self, lvlm: LVLM, data: AnswerData) -> None:
        self.lvlm, self.data = lvlm, data

    def share(self, rows: Sequence[int]) -> AnswerBatch:
        """The batch."""
        return make_batch(self.lvlm, self.data, rows)

    def losses(self, shared: AnswerBatch, name: str) -> Losses:
        """The losses of the batch."""
        device = self.lvlm.device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in shared.inputs.items()}
        with undisturbed(self.lvlm.module):
            logits = self.lvlm.module(**given, use_cache=False).logits
        read = logits.gather(
            1, shared.positions.to(device)[..., None].expand(-1, -1, logits.shape[-1])
        )
        total, correct = score(read.float(), shared.targets.to(device))
        return Losses(total, shared.answer_tokens, correct, {})


def finetune(
    lvlm: LVLM,
    dataset: Iterable[Any],
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    validation: float,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train parameters that are part of the model's own forward pass, as `train_lsg` trains gates.

    Args:
        lvlm: The model.
        dataset: Records with image, question and answer.
        parameters: What to train, by name; everything else stays. The weights of the lowest
            validation loss remain.
        settings: As for gates.
        validation: Share of the images to hold out.
        progress: Whether to show a progress bar.

    Returns:
        The history: one line per step and split, with the loss in nats per answer token.
    """
    data = read_dataset(dataset, lvlm.tokenizer)
    rows, held = data.split(validation, settings.seed)
    objective = WholeObjective(lvlm, data)
    loop = Loop([Trainee(NAME, parameters)], objective, rows, held, settings, progress=progress)
    loop.run()
    return loop.history


INSTALL = 'pip install "sinkscope[lora]"'


@dataclass(frozen=True, eq=False)
class LoRA:
    """A trained adapter, as a condition of `compare`.

    Attributes:
        factors: Module path -> ``(B, A)``, float ``[d_out rank]`` and ``[rank d_in]`` in fp32.
        rank: The rank ``r``.
        alpha: The adapter adds ``(alpha / r) B A``.
        parameters: How many numbers were trained.
        wanted: How many it was to have: those of the gate; None if the rank was given.
        history: One line per step and split, with the loss in nats per answer token.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: int
    parameters: int
    wanted: int | None
    history: tuple[Mapping[str, Any], ...]

    @contextmanager
    def apply(self, lvlm: LVLM) -> Iterator[LVLM]:
        """The model with the adapter in its weights, until the block ends; then bitwise itself.

        The sum is rounded to the model's dtype, once per block.

        ::

            with adapter.apply(lvlm):
                lvlm.generate(sample)

        Args:
            lvlm: The model it was trained on.

        Yields:
            The same model.

        Raises:
            ModelError: If a matrix is missing, of another shape, or not of floating point.
        """
        weights = [(linear_of(lvlm, path), *pair) for path, pair in self.factors.items()]
        for (module, up, down), path in zip(weights, self.factors, strict=True):
            shape = (up.shape[0], down.shape[1])
            if tuple(module.weight.shape) != shape:
                raise ModelError(
                    f"Got a matrix of shape {tuple(module.weight.shape)} at {path}; expected {shape}, "
                    "that of the model the adapter was trained on."
                )
        before = [module.weight.data for module, _, _ in weights]
        try:
            for module, up, down in weights:
                old = module.weight.data
                change = (self.alpha / self.rank) * (up.to(old.device) @ down.to(old.device))
                module.weight.data = (old.float() + change).to(old.dtype)
            yield lvlm
        finally:
            for (module, _, _), old in zip(weights, before, strict=True):
                module.weight.data = old

    def __repr__(self) -> str:
        size = "" if self.wanted is None else f" (a gate has {self.wanted})"
        return f"LoRA(rank={self.rank}, {len(self.factors)} matrices, {self.parameters} parameters{size})"


def lora(
    lvlm: LVLM,
    dataset: Iterable[Any],
    layer: int,
    *,
    like: LSG | None = None,
    rank: int | None = None,
    alpha: int | None = None,
    targets: Sequence[str] | None = None,
    epochs: int = 2,
    batch: int = 8,
    lr: float = 1e-3,
    validation: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> LoRA:
    """Train a LoRA on one block of the decoder, of the size of a gate.

    The paper's table has LoRA with r = 8 "at L10". With the four projections of attention in a decoder
    of width 4096 that is 262,144 parameters, the size of a gate, so these are the default; the paper
    as we read it does not name the matrices.

    Args:
        lvlm: The model; its weights are frozen, and bitwise the same afterwards.
        dataset: Records with image, question and answer, as for a gate.
        layer: The block to adapt.
        like: A gate: the rank is then the one whose number of parameters is closest to the gate's.
        rank: The rank itself, instead of ``like``.
        alpha: The adapter adds ``(alpha / rank) B A``; None for twice the rank.
        targets: Names of linear maps of the block, such as ``["q_proj", "v_proj"]``; None for those of
            its attention.
        epochs: How often every record is seen, as for a gate (see `sinkscope.lsg.TrainingSettings`), whose
            loop, loss and defaults are used.
        batch: Records per step, likewise.
        lr: Highest learning rate, likewise.
        validation: Share of the images to hold out; the weights of the lowest loss there are kept.
            0 trains on all, and keeps the last.
        seed: Of the initial values, of the split and of the order of records.
        progress: Whether to show a progress bar.

    Returns:
        The adapter.

    Raises:
        ModelError: If peft is not installed, or the matrices cannot be adapted.
        LayerError: If there is no such block.
        InputError: If neither or both of ``like`` and ``rank`` are given, a target is unknown, or the
            dataset is not whole.
    """
    check_installed()
    paths = target_paths(lvlm, layer, targets)
    per_rank = sum(sum(linear_of(lvlm, path).weight.shape) for path in paths)
    r, wanted = choose_rank(per_rank, like, rank)
    scale = 2 * r if alpha is None else alpha
    settings = TrainingSettings(epochs=epochs, batch=batch, lr=lr, seed=seed)
    with frozen(lvlm.module), adapted(lvlm, paths, r, scale, seed) as layers:
        parameters = {
            f"{path}.{name}": p
            for path, *pair in layers
            for name, p in zip("BA", pair, strict=True)
        }
        history = finetune(lvlm, dataset, parameters, settings, validation, progress=progress)
        factors = {
            path: (up.detach().float().clone(), down.detach().float().clone())
            for path, up, down in layers
        }
    return LoRA(factors, r, scale, r * per_rank, wanted, tuple(history))


def check_installed() -> None:
    """Refuse to go on without peft.

    Raises:
        ModelError: If it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"Got no package peft, which LoRA needs; expected it to be installed. Run {INSTALL}, or "
            "leave this baseline out."
        )


def target_paths(lvlm: LVLM, layer: int, targets: Sequence[str] | None) -> list[str]:
    """Paths of the linear maps to adapt.

    Raises:
        LayerError: If there is no such block.
        InputError: If a target is not in it.
    """
    tower = lvlm.anatomy.language
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < tower.n_layers:
        raise LayerError(
            f"Got layer={layer!r} for a LoRA; expected 0 to {tower.n_layers - 1}: a decoder block."
        )
    block = tower.blocks[layer] if targets is not None else tower.attention[layer]
    linear = {
        f"{block}.{name}": name.rpartition(".")[2]
        for name, module in lvlm.module.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear)
    }
    if targets is None:
        return list(linear)
    known = sorted(set(linear.values()))
    wrong = [name for name in targets if name not in known]
    if isinstance(targets, str) or wrong or not targets:
        hint = nearest(wrong[0], known) if wrong and not isinstance(targets, str) else ""
        raise InputError(f"Got targets={targets!r}; expected some of {known}, as a list. {hint}")
    return [path for path, name in linear.items() if name in targets]


def linear_of(lvlm: LVLM, path: str) -> nn.Linear:
    """The linear map at a path, with weights that can be added to.

    Raises:
        ModelError: If there is none.
    """
    module = dict(lvlm.module.named_modules()).get(path)
    linear = isinstance(module, nn.Linear) and module.weight.is_floating_point()
    if not isinstance(module, nn.Linear) or not linear or module.weight.device.type == "meta":
        raise ModelError(
            f"Got {type(module).__name__} at {path}; expected a linear map whose weights are here, in "
            "floating point. Load the model without quantisation, offloading and remote=True."
        )
    return module


def choose_rank(per_rank: int, like: LSG | None, rank: int | None) -> tuple[int, int | None]:
    """The rank, and how many parameters it was chosen for.

    Args:
        per_rank: Parameters per unit of rank.
        like: See `lora`.
        rank: See `lora`.

    Raises:
        InputError: If not exactly one is given, or the rank is no positive integer.
    """
    if (like is None) == (rank is None):
        raise InputError(
            f"Got like={like!r} and rank={rank!r}; expected one of them. Write like=gate for the size "
            "of a gate, or rank=8."
        )
    if like is not None:
        wanted = sum(p.numel() for p in like.parameters())
        return max(1, round(wanted / per_rank)), wanted
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"Got rank={rank!r}; expected an int of 1 or more.")
    return rank, None


@contextmanager
def adapted(
    lvlm: LVLM, paths: Sequence[str], rank: int, alpha: int, seed: int
) -> Iterator[list[tuple[str, nn.Parameter, nn.Parameter]]]:
    """The model with a fresh adapter of peft in it, until the block ends.

    Yields:
        Path, ``B`` and ``A`` of every adapted matrix, in fp32.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    module = lvlm.module
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(paths), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(module, config, "default")
    try:
        layers = []
        for path in paths:
            layer: Any = module.get_submodule(path)
            up, down = layer.lora_B["default"], layer.lora_A["default"]
            up.float()
            down.float()
            layers.append((path, up.weight, down.weight))
        yield layers
    finally:
        tuner.unload()
