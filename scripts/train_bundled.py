"""Train the small vision-language model that ships with sinkscope.

    python scripts/train_bundled.py --out DIR

Stage 1 trains the tower: each patch names its place on the grid and what stands there, CLS counts the
shapes; the heads it needs for that are thrown away. Stage 2 freezes the tower, as LLaVA-1.5 does, and
trains projector and decoder on next tokens of questions and answers.
The run can be stopped and started again: `DIR/state.pt` is replaced atomically and holds everything.
On cores shared with other work, `OMP_WAIT_POLICY=PASSIVE` in the environment saves much time.
When it is done, `DIR` holds the model as transformers stores it, and `state.pt` may be deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from bundled_model.packing import Batch, pack
from bundled_model.pretraining import VisionHeads, vision_loss
from bundled_model.recipe import build_config, build_processor
from bundled_model.scoring import answer, one_question_per_task, right_by_task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from sinkscope.bundled import TRAIN_SEEDS, VALIDATION_SEEDS, Scene, draw_scene


@dataclass(frozen=True)
class Plan:
    """How long and how fast; `question_weight` is the weight of question tokens in the loss."""

    vision_steps: int
    vision_batch: int
    steps: int
    batch: int
    turns: int
    peak_rate: float
    weight_decay: float
    question_weight: float
    seed: int


def language_loss(
    model: LlavaForConditionalGeneration, batch: Batch, question_weight: float
) -> Tensor:
    """Next-token loss: mean over answer tokens, plus the weighted mean over question tokens."""
    device = model.device
    closed = torch.zeros(batch.visible.shape).masked_fill(~batch.visible, -1e9)
    logits = model(
        input_ids=batch.input_ids.to(device),
        pixel_values=batch.pixels.to(device),
        attention_mask=closed.to(device),
        position_ids=batch.positions.to(device),
        use_cache=False,
    ).logits
    is_text, is_answer = batch.is_text[:, 1:], batch.is_answer[:, 1:]
    # The first word of a turn is predicted from the image, also where turns lie side by side.
    first = batch.is_text[:, 1:] & (batch.positions[:, 1:] != batch.positions[:, :-1] + 1)
    losses = cross_entropy(
        logits[:, :-1][is_text.to(device)].float(),
        batch.input_ids[:, 1:][is_text].to(device),
        reduction="none",
    )
    answers = is_answer[is_text].to(device)
    questions = (is_text & ~is_answer & ~first)[is_text].to(device)
    return losses[answers].mean() + question_weight * losses[questions].mean()


def rate_at(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine down to 2 % of the peak."""
    warmup = max(1, int(0.03 * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(modules: Sequence[nn.Module], plan: Plan) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.98))


def apply_gradient(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step of the optimizer at this rate, with the gradient's norm clipped at 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def scenes_for(step: int, plan: Plan) -> list[Scene]:
    """The scenes of one step: always new ones, the same for the same step."""
    early, late = min(step, plan.vision_steps), max(0, step - plan.vision_steps)
    start = early * plan.vision_batch + late * plan.batch
    size = plan.vision_batch if step < plan.vision_steps else plan.batch
    return [draw_scene(seed) for seed in TRAIN_SEEDS[start : start + size]]


def evaluate(model: LlavaForConditionalGeneration, scenes: int) -> dict[str, float]:
    """Accuracy per task on the first validation scenes, one question per task and scene."""
    model.eval()
    pairs = [
        pair
        for seed in VALIDATION_SEEDS[:scenes]
        for pair in one_question_per_task(draw_scene(seed))
    ]
    right = right_by_task(pairs, answer(model, build_processor(), pairs))
    model.train()
    return {task: sum(values) / len(values) for task, values in right.items()}


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write next to the target, then rename: a stopped run leaves the old state whole."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def step_loss(
    model: LlavaForConditionalGeneration, heads: VisionHeads, step: int, plan: Plan
) -> Tensor:
    """The loss of one step of either stage; one language step in five is a conversation."""
    scenes = scenes_for(step, plan)
    with torch.autocast(model.device.type, torch.bfloat16):
        if step < plan.vision_steps:
            return vision_loss(model.model.vision_tower, heads, scenes)
        batch = pack(scenes, seed=step, turns=plan.turns, isolated=step % 5 != 0)
        return language_loss(model, batch, plan.question_weight)


def train(plan: Plan, out: Path, device: str, save_every: int) -> LlavaForConditionalGeneration:
    """Both stages, from `out/state.pt` if it is there; returns the model in evaluation mode."""
    torch.manual_seed(plan.seed)
    # On a CPU the eager backward pass is faster than the fused one at these lengths.
    model = LlavaForConditionalGeneration._from_config(
        build_config(), attn_implementation="eager" if device == "cpu" else "sdpa"
    )
    model = model.to(device).train()
    heads = VisionHeads(model.config.vision_config.hidden_size).to(device)
    vision = make_optimizer([model.model.vision_tower, heads], plan)
    readers = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    language = make_optimizer(readers, plan)
    kept = {"model": model, "heads": heads, "vision": vision, "language": language}
    start, state_file, began = 0, out / "state.pt", time.monotonic()
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        start, began = state["step"], began - state["seconds"]
        for name, part in kept.items():
            part.load_state_dict(state[name])
    total = plan.vision_steps + plan.steps
    bar = tqdm(range(start, total), initial=start, total=total, mininterval=10)
    for step in bar:
        in_vision = step < plan.vision_steps
        model.model.vision_tower.requires_grad_(in_vision)
        at = step if in_vision else step - plan.vision_steps
        rate = rate_at(at, plan.vision_steps if in_vision else plan.steps, plan.peak_rate)
        loss = step_loss(model, heads, step, plan)
        apply_gradient(loss, vision if in_vision else language, rate)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == total:
            seconds = time.monotonic() - began
            state = {name: part.state_dict() for name, part in kept.items()}
            save_state(state_file, state | {"step": step + 1, "seconds": seconds})
            tqdm.write(f"step {step + 1}, {seconds / 60:.1f} min, loss {loss.item():.4f}")
            if not in_vision:
                tqdm.write(f"  validation {evaluate(model, 100)}")
    return model.eval()


def parse_arguments() -> argparse.Namespace:
    """The command line; its defaults are the plan of the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and state")
    parser.add_argument("--vision-steps", type=int, default=1400, help="steps of stage 1")
    parser.add_argument("--vision-batch", type=int, default=48, help="scenes a step of stage 1")
    parser.add_argument("--steps", type=int, default=2600, help="steps of stage 2")
    parser.add_argument("--batch", type=int, default=16, help="scenes a step of stage 2")
    parser.add_argument("--turns", type=int, default=8, help="questions a scene, at most 9")
    parser.add_argument("--peak-rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--question-weight", type=float, default=0.2, help="loss on questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=int, default=350, help="steps between saves")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train, store the model and its processor, and print validation accuracies."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    names = Plan.__dataclass_fields__
    plan = Plan(**{name: getattr(arguments, name) for name in names})
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = train(plan, arguments.out, arguments.device, arguments.save_every)
    model.save_pretrained(arguments.out)
    build_processor().save_pretrained(arguments.out)
    seconds = torch.load(arguments.out / "state.pt", weights_only=True)["seconds"]
    record = {"plan": asdict(plan), "seconds": seconds, "device": arguments.device}
    record |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    record |= {"transformers": transformers.__version__}
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    for task, accuracy in evaluate(model, 500).items():
        print(f"{task:14} {accuracy:.3f}")


if __name__ == "__main__":
    main()
