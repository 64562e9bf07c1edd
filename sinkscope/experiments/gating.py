"""What gates answer, by task and layer, and LoRA as their baseline: as many parameters, the same training."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

from sinkscope.anatomy.weights import check_graph
from sinkscope.checks import check_choice, check_whole, typed
from sinkscope.data.ahead import Batches
from sinkscope.data.batches import AnswerBatch, TokenScores, read_dataset
from sinkscope.data.items import Item, as_items, check_tasks
from sinkscope.errors import InputError, LayerError, ModelError, nearest
from sinkscope.experiments.statistics import BY, by_task, cluster_intervals
from sinkscope.kernels.writes import quantised
from sinkscope.lsg import LSG
from sinkscope.lsg.gate import check_gates
from sinkscope.lsg.passes import Losses, frozen, gate_inputs, gate_signals
from sinkscope.models.lvlm import LVLM
from sinkscope.models.prompts import check_questions
from sinkscope.models.wrapping import evaluated, undisturbed
from sinkscope.results import Result
from sinkscope.tokens import TokenMap
from sinkscope.training import TrainingSettings
from sinkscope.training.loop import Loop, Trainee
from sinkscope.viz.probes import plot_coefficients

CELL = ["layer", "edited", "group"]


@dataclass(frozen=True, eq=False)
class GateCoefficients(Result):
    """The coefficients that gates give for questions; ``by`` is what means are split by if nothing is said.

    ``table`` has one line per question, gate and group: item, image_id, task, layer (that the gate reads;
    -1 is ``"embed"``), edited (the block whose keys it scales), group (``"V"``, ``"L"`` or ``"rest"``),
    coefficient (a factor of keys; a question's groups add to the gate's scale), untrained (the scale
    over the number of groups) and tokens (image tokens of the group).
    """

    table: pd.DataFrame
    by: str = "task"

    def to_dataframe(self, by: str | None = None, **intervals: Any) -> pd.DataFrame:
        """Average coefficients by task, layer and group, with intervals by bootstrap over images.

        ``by`` is ``"task"`` or ``"all"``, None for what it was made with; with several tasks all
        questions together come last. ``intervals``: ``level``, ``draws`` and ``seed`` of `cluster_intervals`.

        Columns are task, layer, edited, group, n (questions), images, coefficient, low, high, untrained
        and tokens (means).
        """
        tables = []
        for task, part in by_task(self.table, self.by if by is None else by):
            wide = part.pivot(index="item", columns=CELL, values="coefficient")
            images = part.drop_duplicates("item").set_index("item")["image_id"].loc[wide.index]
            means = cluster_intervals(wide.to_numpy(dtype=float), images.tolist(), **intervals)
            cells = pd.DataFrame(list(wide.columns), columns=CELL)
            numbers = dict(zip(("coefficient", "low", "high"), means, strict=True))
            made = cells.assign(n=len(wide), images=images.nunique(), **numbers)
            made = made.join(part.groupby(CELL)[["untrained", "tokens"]].mean(), on=CELL)
            made.insert(0, "task", task)
            tables.append(made)
        return pd.concat(tables, ignore_index=True)

    def plot(self, by: str | None = None, *, seed: int = 0) -> Figure:
        """Draw coefficients by layer, a panel per group, a line per task; see `to_dataframe`."""
        return plot_coefficients(self.to_dataframe(by, seed=seed))

    def __repr__(self) -> str:
        nouns = {"question": "item", "image": "image_id", "gate": "layer"}
        counts = {noun: self.table[name].nunique() for noun, name in nouns.items()}
        said = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in counts.items())
        return f"GateCoefficients({said})"


@torch.no_grad()
@typed
def gate_coefficients(
    lvlm: LVLM,
    gates: LSG | Sequence[LSG],
    dataset: Iterable[Any],
    by: str = "task",
    *,
    batch: int = 8,
    progress: bool | None = None,
) -> GateCoefficients:
    """Measure the coefficients that gates give for questions (Choi et al. 2604.03316).

    Every gate is asked **alone**, on one pass of the plain model. In a stack a gate reads what those below it
    left, and may answer otherwise: see ``run.effects[gate]``. The coefficients are those of the prompt, also
    for a gate with ``decode="refresh"``.

    The gates are of different layers, such as ``result.gates.values()``, and were made for this model (else
    InterventionError). ``dataset`` holds records as for `sweep`, not those trained on. Means are split ``by``
    ``"task"``, or ``"all"``. ``batch`` is questions per forward pass; ``progress=None`` shows a bar from 50
    questions on.
    """
    given = check_gates(gates)
    check_choice(BY, by=by)
    check_whole(1, batch=batch)
    if lvlm.processor is None or lvlm.device.type == "meta":
        came = "an LVLM without a processor or without weights"
        raise InputError(f"Got {came}; expected both, so no remote=True.")
    layers = [gate.layer for gate in given]
    if len(set(layers)) < len(layers):
        raise InputError(f"Got gates of the layers {layers}; expected every layer once in a call.")
    for gate in given:
        gate.check_fits(lvlm)
    items = as_items(dataset)
    check_tasks(items)
    check_questions(lvlm.processor, items)
    blocks, lines = [gate.config.edited for gate in given], []
    hidden = len(items) < 50 if progress is None else not progress
    bar = tqdm(total=len(items), desc="reading gates", unit="question", disable=hidden)
    with bar, evaluated(lvlm.module):
        for start in range(0, len(items), batch):
            some = items[start : start + batch]
            sample = lvlm.prepare(images=[i.image for i in some], text=[i.question for i in some])
            captured, vision = gate_inputs(lvlm, sample.inputs, blocks)
            for gate, block in zip(given, blocks, strict=True):
                found = gate_signals(gate, sample.tokens, vision, captured.state(block))
                lines += _lines(gate, dict(enumerate(some, start)), found, sample.tokens)
            bar.update(len(some))
    table = pd.DataFrame(lines).sort_values(["item", "edited"], kind="stable", ignore_index=True)
    return GateCoefficients(table, by)


def _lines(
    gate: LSG, part: Mapping[int, Item], found: Mapping[str, Tensor], tokens: TokenMap
) -> Iterator[dict[str, Any]]:
    visual = (tokens.image >= 0).to(found["coefficients"].device)
    sinks = {"V": visual & found["V"], "L": visual & found.get("L", visual) & ~found["V"]}
    sinks["rest"] = visual & ~torch.stack([sinks[name] for name in gate.groups[:-1]]).any(dim=0)
    edited, untrained = gate.config.edited, gate.config.scale / len(gate.groups)
    for group, values in zip(gate.groups, found["coefficients"].T.tolist(), strict=True):
        counts = sinks[group].sum(dim=1).tolist()
        for row, (number, item) in enumerate(part.items()):
            at = {"item": number, "image_id": item.image_id, "task": item.task}
            at |= {"layer": edited - 1, "edited": edited, "group": group}
            yield at | {"coefficient": values[row], "untrained": untrained, "tokens": counts[row]}


@dataclass(frozen=True, eq=False)
class _Objective:
    """Next-token loss of the answers under the whole model, adapter included."""

    lvlm: LVLM
    batches: Batches

    def share(self, rows: Sequence[int], then: Sequence[int] = ()) -> AnswerBatch:
        return self.batches.of(rows, then)

    def losses(self, shared: AnswerBatch, name: str) -> Losses:
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

    ``factors`` are module path -> ``(B, A)``, float ``[d_out rank]`` and ``[rank d_in]`` in fp32;
    ``parameters`` is how many numbers were trained, ``wanted`` how many the gate has whose size it takes
    (None if the rank was given); ``history`` has a line per step and split, with the loss in nats per answer
    token.
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
        modules = {path: linear_of(lvlm, path) for path in self.factors}
        for path, (up, down) in self.factors.items():
            came, wanted = tuple(modules[path].weight.shape), (up.shape[0], down.shape[1])
            if came != wanted:
                of = "that of the model the adapter was trained on"
                raise ModelError(
                    f"Got a matrix of shape {came} at {path}; expected {wanted}, {of}."
                )
        before = {path: module.weight.data for path, module in modules.items()}
        try:
            for path, (up, down) in self.factors.items():
                old = before[path]
                change = (self.alpha / self.rank) * (up.to(old.device) @ down.to(old.device))
                modules[path].weight.data = (old.float() + change).to(old.dtype)
            yield lvlm
        finally:
            for path, old in before.items():
                modules[path].weight.data = old

    def __repr__(self) -> str:
        size = "" if self.wanted is None else f" (a gate has {self.wanted})"
        return f"LoRA(rank={self.rank}, {len(self.factors)} matrices, {self.parameters} parameters{size})"


@typed
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
    of width 4096, the default, that is 262,144 parameters, the size of a gate. The model's weights are
    frozen, and bitwise the same afterwards.

    Args:
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
    check_graph(lvlm.module)
    paths = target_paths(lvlm, layer, targets)
    per_rank = sum(sum(linear_of(lvlm, path).weight.shape) for path in paths)
    r, wanted = choose_rank(per_rank, like, rank)
    scale, given = 2 * r if alpha is None else alpha, TrainingSettings(**settings)
    with frozen(lvlm.module), adapted(lvlm, paths, r, scale, given.seed) as layers:
        pairs = {
            f"{path}.{x}": p for path in paths for x, p in zip("BA", layers[path], strict=True)
        }
        data = read_dataset(dataset, lvlm.tokenizer)
        rows, held = data.split(validation, given.seed)
        trainee, batches = Trainee("LoRA", pairs), Batches(lvlm, data)
        loop = Loop([trainee], _Objective(lvlm, batches), rows, held, given, progress=progress)
        with batches:
            loop.run()
        kept = {path: [p.detach().float().clone() for p in layers[path]] for path in layers}
    factors = {path: (up, down) for path, (up, down) in kept.items()}
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
        if not quantised(weight) and weight.device.type != "meta":
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
    if like is None and rank is not None:
        check_whole(1, rank=rank)
        return rank, None
    raise InputError(
        f"Got like={like!r} and rank={rank!r}; expected one of them. Write like=gate for the size of a "
        "gate, or rank=8."
    )


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
