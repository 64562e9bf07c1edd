"""Stand-ins for the kernels of flash-attn 2 and 3, which run on no CPU: `transformers` calls them as the real ones.

Only the functions of the packages are replaced. What `transformers` does around them runs as it is: masks
``[batch key]``, unpadding, lengths of packed towers, windows, the dtype.
"""

import torch
from transformers import PreTrainedModel, modeling_flash_attention_utils, modeling_utils

TAKES = {"dtypes": (torch.float16, torch.bfloat16)}


def attend(q, k, v, softmax_scale, causal, window_size, softcap, s_aux=None):
    """One sequence ``[pos head d]`` as the kernels compute it: half-precision inputs and weights, fp32 sums."""
    if q.dtype not in TAKES["dtypes"] or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if max(x.shape[-1] for x in (q, k, v)) > 256 or q.shape[-1] != v.shape[-1]:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    dtype, (q, k, v) = q.dtype, (x.transpose(0, 1).float() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    # The last query stands at the last key.
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = ((right >= 0) & (ahead > right)) | ((left >= 0) & (-ahead > left))
    logits = logits.masked_fill(hidden, float("-inf"))
    sums = logits.logsumexp(dim=-1, keepdim=True)
    total = sums if s_aux is None else torch.logaddexp(sums, s_aux.float()[:, None, None])
    weights = (logits - total).exp().nan_to_num().to(dtype).float()
    return (weights @ v).transpose(0, 1), total[..., 0]


def attend_all(parts, dtype, *options):
    """Sequences one by one: outputs and log-sum-exps."""
    each = [attend(*part, *options) for part in parts]
    return [out.to(dtype) for out, _ in each], [lse for _, lse in each]


def cut(x, ends):
    """The sequences of a packed tensor."""
    return [x[a:b] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options):
    """Several sequences in one, told apart by where they end."""
    if cu_seqlens_q.dtype != torch.int32 or int(cu_seqlens_q.diff().max()) > int(max_seqlen_q):
        raise RuntimeError("cu_seqlens_q must have dtype int32 and fit max_seqlen_q")
    if int(cu_seqlens_k.diff().max()) > int(max_seqlen_k):
        raise RuntimeError("cu_seqlens_k must fit max_seqlen_k")
    parts = zip(cut(q, cu_seqlens_q), cut(k, cu_seqlens_k), cut(v, cu_seqlens_k), strict=True)
    outputs, sums = attend_all(parts, q.dtype, *options)
    return torch.cat(outputs), torch.cat(sums, dim=-1)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Version 2, ``[batch pos head d]``."""
    options = softmax_scale, causal, window_size, softcap
    return torch.stack(attend_all(zip(q, k, v, strict=True), q.dtype, *options)[0])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    """Version 2, several sequences packed, ``[pos head d]``."""
    options = softmax_scale, causal, window_size, softcap
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)[0]


def flash_attn_3_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    s_aux=None,
):  # fmt: skip
    """Version 3 (that of vLLM, with learned sinks), which gives the log-sum-exp too."""
    options = softmax_scale, causal, window_size, softcap, s_aux
    outputs, sums = attend_all(zip(q, k, v, strict=True), q.dtype, *options)
    return torch.stack(outputs), torch.stack(sums)


def flash_attn_3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    s_aux=None,
):  # fmt: skip
    """The same for packed sequences."""
    options = softmax_scale, causal, window_size, softcap, s_aux
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)


KERNELS = {
    "flash_attention_2": (flash_attn_func, flash_attn_varlen_func),
    "flash_attention_3": (flash_attn_3_func, flash_attn_3_varlen_func),
}


def install(monkeypatch, takes=(torch.float16, torch.bfloat16)):
    """Let `transformers` take the names of both versions, and find these kernels under them, for some dtypes."""
    monkeypatch.setitem(TAKES, "dtypes", takes)
    here = modeling_flash_attention_utils

    def imported(implementation, *given, **options):
        return (*KERNELS[implementation], None, here._pad_input, here._unpad_input)

    monkeypatch.setattr(here, "_lazy_imports", imported)
    monkeypatch.setattr(here, "_loaded_implementation", None)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: False)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *a, **k: True)
