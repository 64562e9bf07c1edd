"""LoRA as a baseline of gates: as many parameters, the same loss, loop and batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.checks import check_whole
from sinkscope.data.batches import AnswerBatch, AnswerData, make_batch, read_dataset
from sinkscope.data.tokens import TokenScores
from sinkscope.errors import InputError, LayerError, ModelError, nearest
from sinkscope.lsg import LSG
from sinkscope.lsg.passes import Losses, frozen
from sinkscope.models.lvlm import LVLM
from sinkscope.models.wrapping import undisturbed
from sinkscope.training import TrainingSettings
from sinkscope.training.loop import Loop, Trainee


@dataclass(frozen=True, eq=False)
class WholeObjective:
    """Next-token loss of the answers under the whole model, adapter included."""

    lvlm: LVLM
    data: AnswerData

    def share(self, rows: Sequence[int]) -> AnswerBatch:
        """The batch."""
        return make_batch(self.lvlm, self.data, rows)

    def losses(self, shared: AnswerBatch, name: str) -> Losses:
        """The losses of the batch."""
        device = self.lvlm.device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in shared.inputs.items()}
        with undisturbed(self.lvlm.module):
            logits = self.lvlm.module(**given, use_cache=False).logits
        at = shared.positions.to(device)[..., None].expand(-1, -1, logits.shape[-1])
        scores = TokenScores.of(logits.gather(1, at), shared.targets)
        return Losses(scores.loss, shared.answer_tokens, scores.exact, {})


@dataclass(frozen=True, eq=False)
class LoRA:
    """A trained adapter, as a condition of `compare`; it adds ``(alpha / rank) B A`` to weights.

    Attributes:
        factors: Module path -> ``(B, A)``, float ``[d_out rank]`` and ``[rank d_in]`` in fp32.
        parameters: How many numbers were trained.
        wanted: How many the gate has whose size it takes; None if the rank was given.
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
        """Add the adapter to the weights until the block ends; then they are bitwise as before.

        The sum is rounded to the dtype of the model, which must be the one it was trained on (ModelError).
        """
        before = {}
        for path, (up, down) in self.factors.items():
            module = linear_of(lvlm, path)
            came, wanted = tuple(module.weight.shape), (up.shape[0], down.shape[1])
            if came != wanted:
                raise ModelError(
                    f"Got a matrix of shape {came} at {path}; expected {wanted}, that of the model the "
                    "adapter was trained on."
                )
            before[path] = module, module.weight.data
        try:
            for path, (up, down) in self.factors.items():
                module, old = before[path]
                change = (self.alpha / self.rank) * (up.to(old.device) @ down.to(old.device))
                module.weight.data = (old.float() + change).to(old.dtype)
            yield lvlm
        finally:
            for module, old in before.values():
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
    validation: float = 0.1,
    progress: bool = False,
    **settings: Any,
) -> LoRA:
    """Train a LoRA on one block of the decoder, of the size of a gate (2106.09685).

    The table of 2604.03316 has r = 8 "at L10" and names no matrices; on the four projections of attention
    of width 4096, the default, that is 262,144 parameters, the size of a gate.

    Args:
        lvlm: The model; its weights are frozen, and bitwise the same afterwards.
        dataset: Records with image, question and answer, as for a gate.
        layer: The block to adapt.
        like: A gate, whose number of parameters the rank comes closest to; else give the ``rank``.
        alpha: The adapter adds ``(alpha / rank) B A``; None for twice the rank.
        targets: Linear maps of the block, such as ``["q_proj"]``; None for those of its attention.
        validation: Share of the images to hold out; the weights of the lowest loss there stay. 0: none.
        settings: ``epochs``, ``batch``, ``lr``, ``seed`` and others of `sinkscope.lsg.TrainingSettings`;
            the seed is that of the initial values too.

    Raises:
        ModelError: If peft is not installed, or the matrices cannot be adapted.
    """
    if importlib.util.find_spec("peft") is None:
        wanted = 'expected it to be installed. Run pip install "sinkscope[lora]"'
        raise ModelError(f"Got no package peft, which LoRA needs; {wanted}.")
    paths = target_paths(lvlm, layer, targets)
    per_rank = sum(sum(linear_of(lvlm, path).weight.shape) for path in paths)
    r, wanted = choose_rank(per_rank, like, rank)
    scale, given = 2 * r if alpha is None else alpha, TrainingSettings(**settings)
    with frozen(lvlm.module), adapted(lvlm, paths, r, scale, given.seed) as layers:
        pairs = [(path, x, p) for path in paths for x, p in zip("BA", layers[path], strict=True)]
        data = read_dataset(dataset, lvlm.tokenizer)
        rows, held = data.split(validation, given.seed)
        trainee = Trainee("LoRA", {f"{path}.{x}": parameter for path, x, parameter in pairs})
        objective = WholeObjective(lvlm, data)
        loop = Loop([trainee], objective, rows, held, given, progress=progress)
        loop.run()
        factors = {
            path: (up.detach().float().clone(), down.detach().float().clone())
            for path, (up, down) in layers.items()
        }
    return LoRA(factors, r, scale, r * per_rank, wanted, tuple(loop.history))


def target_paths(lvlm: LVLM, layer: int, targets: Sequence[str] | None) -> list[str]:
    """Paths of the linear maps to adapt."""
    tower = lvlm.anatomy.language
    check_whole(0, tower.n_layers - 1, error=LayerError, hint="Name a decoder block.", layer=layer)
    block = tower.blocks[layer] if targets is not None else tower.attention[layer]
    inside = lvlm.module.get_submodule(block).named_modules()
    names = [name for name, module in inside if isinstance(module, nn.Linear)]
    linear = {f"{block}.{name}": name.rpartition(".")[2] for name in names}
    if targets is None:
        return list(linear)
    known = sorted(set(linear.values()))
    wrong = [] if isinstance(targets, str) else [name for name in targets if name not in known]
    if isinstance(targets, str) or wrong or not targets:
        hint = nearest(wrong[0], known) if wrong else ""
        raise InputError(f"Got targets={targets!r}; expected some of {known}, as a list. {hint}")
    return [path for path, name in linear.items() if name in targets]


def linear_of(lvlm: LVLM, path: str) -> nn.Linear:
    """The linear map at a path, with weights that can be added to."""
    module = dict(lvlm.module.named_modules()).get(path)
    if isinstance(module, nn.Linear):
        weight = module.weight
        if weight.is_floating_point() and weight.device.type != "meta":
            return module
    raise ModelError(
        f"Got {type(module).__name__} at {path}; expected a linear map whose weights are here, in "
        "floating point. Load the model without quantisation, offloading and remote=True."
    )


def choose_rank(per_rank: int, like: LSG | None, rank: int | None) -> tuple[int, int | None]:
    """The rank, and how many parameters the gate has that it was chosen for."""
    if like is not None and rank is None:
        wanted = sum(p.numel() for p in like.parameters())
        return max(1, round(wanted / per_rank)), wanted
    if like is not None or rank is None:
        raise InputError(
            f"Got like={like!r} and rank={rank!r}; expected one of them. Write like=gate for the size "
            "of a gate, or rank=8."
        )
    check_whole(1, rank=rank)
    return rank, None


@contextmanager
def adapted(
    lvlm: LVLM, paths: Sequence[str], rank: int, alpha: int, seed: int
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """The model with a fresh adapter of peft; gives path -> ``(B, A)`` in fp32."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(paths), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(lvlm.module, config, "default")
    try:
        layers = {}
        for path in paths:
            layer: Any = lvlm.module.get_submodule(path)
            maps = layer.lora_B["default"].float(), layer.lora_A["default"].float()
            layers[path] = maps[0].weight, maps[1].weight
        yield layers
    finally:
        tuner.unload()
