"""The gate written out in plain PyTorch: an ordinary ``nn.Sequential``, module hooks, and an eager
attention of our own. Nothing of sinkscope's kernels is used, and nothing of nnsight."""

import sys
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sinkscope.testing import TINY


def twin_of(family):
    """The same tiny model under its eager kernel, seen by nobody else."""
    model, _ = TINY[family](attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def sequential(gate):
    """The gate's parameters in modules of torch."""
    out = nn.Sequential(
        nn.LayerNorm(gate.config.d_model, elementwise_affine=gate.config.affine),
        nn.Linear(gate.config.d_model, gate.config.hidden),
        {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}[
            gate.config.activation
        ],
        nn.Linear(gate.config.hidden, len(gate.groups)),
        nn.Softmax(dim=-1),
    )
    own = gate.state_dict()
    names = {"norm.": "0.", "inner.": "1.", "outer.": "3."}
    state = {}
    for name, value in own.items():
        for old, new in names.items():
            if name.startswith(old):
                state[new + name.removeprefix(old)] = value.detach().clone()
    out.load_state_dict(state)
    return out


def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention by its formula."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.shape[2]]
    weights = logits.float().softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Gated:
    """A plain model with a gate on it; a pass of several tokens is a prompt, of one a decode step.

    Args:
        model: An eager ``transformers`` model.
        modules: ``sequential(gate)``.
        layer: The block it reads, or "embed".
        masks: Per coefficient, bool ``[batch pos]`` over the prompt.
        at: Int ``[batch]``: the position it reads in the prompt.
        signal: Bool ``[batch pos]`` to average instead, or None.
        decode: As in the gate.
        scale: As in the gate.
    """

    def __init__(self, model, modules, layer, masks, at, signal=None, decode="frozen", scale=1.0):
        self.model, self.modules, self.masks, self.at = model, modules, masks, at
        self.layer, self.signal, self.decode, self.scale = layer, signal, decode, scale
        self.coefficients = None
        self.decoding = False

    @contextmanager
    def on(self):
        decoder = self.model.get_decoder()
        home = sys.modules[type(decoder.layers[0].self_attn).__module__]
        before = home.eager_attention_forward
        edited = decoder.layers[0 if self.layer == "embed" else self.layer + 1].self_attn

        def attend(module, query, key, value, *rest, **kwargs):
            if module is edited:
                key = self.scaled(key)
            return eager(module, query, key, value, *rest, **kwargs)

        with ExitStack() as stack:
            stack.callback(setattr, home, "eager_attention_forward", before)
            home.eager_attention_forward = attend
            if self.layer == "embed":
                hook = decoder.layers[0].register_forward_pre_hook(
                    lambda m, args, kwargs: self.read(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            else:
                hook = decoder.layers[self.layer].register_forward_hook(
                    lambda m, args, out: self.read(out[0] if isinstance(out, tuple) else out)
                )
            stack.callback(hook.remove)
            yield self

    def read(self, states):
        self.decoding = states.shape[1] == 1
        if self.decoding and self.decode != "refresh":
            return
        if self.decoding:
            read = states[:, -1]
        elif self.signal is None:
            read = states[torch.arange(len(states)), self.at]
        else:
            rows = [states[b, chosen].mean(0) for b, chosen in enumerate(self.signal)]
            read = torch.stack(rows)
        self.coefficients = self.scale * self.modules(read.float())

    def scaled(self, key):
        if self.decoding and self.decode == "off":
            return key
        factor = torch.ones(key.shape[0], key.shape[2])
        for number, mask in enumerate(self.masks):
            grown = nn.functional.pad(mask, (0, key.shape[2] - mask.shape[1]))
            factor = torch.where(grown, self.coefficients[:, number, None], factor)
        return key * factor[:, None, :, None]


def greedy(model, inputs, steps, forced=None):
    """Logits ``[step batch vocab]`` of a cached greedy answer, and its tokens ``[batch step]``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config())
    given = {**inputs, "past_key_values": cache, "use_cache": True}
    logits, tokens = [], []
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if "image_grid_thw" in inputs:
        positions = rope_positions(model, inputs)
    given["position_ids"] = positions
    last = positions.amax(dim=(0, 2))[None, :, None] if positions.ndim == 3 else positions[:, -1:]
    for step in range(steps):
        out = model(**given)
        logits.append(out.logits[:, -1])
        new = out.logits[:, -1].argmax(-1) if forced is None else forced[:, step]
        tokens.append(new)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        given = {
            "input_ids": new[:, None],
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        new_positions = last + 1 + step
        given["position_ids"] = new_positions.expand(3, -1, 1) if last.ndim == 3 else new_positions
    return torch.stack(logits), torch.stack(tokens, dim=1)


def rope_positions(model, inputs):
    """Qwen2.5-VL's three position rows of a prompt."""
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs.get("mm_token_type_ids"),
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    return positions
