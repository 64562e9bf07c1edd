"""One attention call that is made here, a model's kernel in plain torch, and weights by hand in fp64."""

import torch
from torch import nn

HEADS, KV_HEADS, WIDTH, N = 4, 2, 8, 6
NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SINK = torch.tensor([0.5, -1.0, 2.0, 0.0])
LAYOUT = torch.tensor([[0, 1, 2, 3, -1], [4, 5, 6, 7, 8]])  # two images in a packed row of nine


class Module(nn.Module):
    """What a kernel function asks of its attention module."""

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def logits_of(module, query, key, mask, scaling=None, sliding_window=None, softcap=None):
    """Logits in fp64, ``-inf`` at what is hidden."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query.double() @ key.double().transpose(2, 3) * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    n_query, n_key = logits.shape[2:]
    if mask is None:
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device)
        if module.is_causal and n_query > 1:
            mask = mask.tril()
            mask = mask if sliding_window is None else mask & ~mask.tril(-sliding_window)
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    mask = mask[..., :n_key]
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return (logits + mask.double()).masked_fill(hidden, float("-inf"))


def softmax(logits, sink=None):
    """Weights of keys, beside a learned sink ``[head]`` if there is one."""
    if sink is None:
        return logits.softmax(dim=-1).nan_to_num()
    sink = sink.double()[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]


def plain_attention(
    module, query, key, value, attention_mask, scaling=None, s_aux=None, dropout=0.0, **options
):
    """A model's kernel: grouped heads, window, soft cap and learned sink."""
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise RuntimeError("fused kernels take one size of batch")
    if key.shape[-1] != value.shape[-1]:
        raise RuntimeError("fused kernels take one head dimension")
    logits = logits_of(module, query, key, attention_mask, scaling, **options)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    out = softmax(logits, s_aux).to(value.dtype) @ value
    return out.transpose(1, 2), None


def flash_attention(module, query, *rest, **options):
    """The same, for half precision only."""
    if query.dtype == torch.float32:
        raise RuntimeError("this kernel takes fp16 and bf16 only")
    return plain_attention(module, query, *rest, **options)


def make(kernel=plain_attention, batch=2, n_query=N, n_key=N, dtype=torch.float32, **options):
    """A call on random tensors; ``mask`` and ``is_causal`` are options too."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(batch, HEADS, n_query, WIDTH, generator=generator).to(dtype)
    key, value = (
        torch.randn(batch, KV_HEADS, n_key, WIDTH, generator=generator).to(dtype) for _ in range(2)
    )
    module, mask = Module(options.pop("is_causal", True)), options.pop("mask", None)
    return (
        kernel,
        (module, query, key, value),
        {"attention_mask": mask, "scaling": 0.4, "dropout": 0.0, **options},
    )


def logits(call):
    """The call's logits by hand."""
    _, (module, query, key, _), options = call
    kept = {name: x for name, x in options.items() if name not in ("dropout", "s_aux")}
    return logits_of(module, query, key, kept.pop("attention_mask"), **kept)


def weights(call, change=lambda x: x):
    """The call's weights by hand, with a change of its logits."""
    return softmax(change(logits(call)), call[2].get("s_aux"))


def output(call, attended, value=None):
    """What weights by hand write, ``[batch query head d_head]`` in fp64."""
    value = call[1][3] if value is None else value
    value = value.double().repeat_interleave(HEADS // value.shape[1], dim=1)
    return (attended @ value).transpose(1, 2)


def run(call):
    """The output of a call, edited or not."""
    return call[0](*call[1], **call[2])[0]


def bools(*rows):
    """Rows of zeros and ones, as bool."""
    return torch.tensor([[bool(int(x)) for x in row] for row in rows])


def close(got, want, atol=2e-6):
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert torch.allclose(got.double(), want.double(), atol=atol, equal_nan=True)


def windows(dtype=torch.float32, sizes=(2, 4, 3), **options):
    """Windows of a packed tower: calls that tile one row, each with other tensors."""
    made = []
    for at, size in enumerate(sizes):
        call = make(batch=1, n_query=size, n_key=size, dtype=dtype, is_causal=False, **options)
        made.append((call[0], (call[1][0], *(x + at / 7 for x in call[1][1:])), call[2]))
    return made


def blocks(calls):
    """Their weights by hand as one matrix, 0 between windows."""
    size = sum(call[1][1].shape[2] for call in calls)
    out, at = torch.zeros(1, HEADS, size, size).double(), 0
    for call in calls:
        to = at + call[1][1].shape[2]
        out[..., at:to, at:to], at = weights(call), to
    return out


def as_images(x, dim):
    """``[1 ... packed ...]`` as ``[image ... pos ...]``, NaN at padding."""
    out = torch.stack([x[0].index_select(dim - 1, at.clamp(min=0)) for at in LAYOUT])
    out.select(dim, 4)[0] = NAN
    return out
