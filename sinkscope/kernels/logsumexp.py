"""Received attention from log-sum-exps, which a fused kernel knows: two calls, and no gradient.

With ``z`` the logits of one call and ``l_i = log sum_k exp z_ik``, the attention that key k receives is ::

    sum_i A_ik  =  sum_i exp(z_ik - l_i)  =  exp(log sum_i exp(z_ik - l_i))

so keys ask and queries answer, and the log-sum-exp of that call is what is wanted. ``-l_i`` rides in extra
head dimensions, in parts that keep half precision exact; where a query sees no later key, both are reversed.
A token's own weight, and that on any one key per head, follow from ``l`` and one product.
"""

import torch

from sinkscope.kernels.attention import EXTRA, arguments, attending, is_causal

SMALL = 2**18  # logits that may as well be written down
PARTS = 3  # of a number in half precision
UNSEEN = -3.0e4  # what leaves a query no weight, finite in half precision


class Fused:
    """A call whose log-sum-exp a fused kernel gives.

    ``query``, ``key`` and ``value`` ``[batch head pos d_head]``, ``mask`` ``[batch|1 head|1 query key]`` in
    their dtype, or None, ``output`` ``[batch query head d_head]``, and ``lse`` ``[batch head query]`` in fp32;
    ``exact`` is whether all are in fp32.
    """

    def __init__(self, query, key, value, mask, causal, scale):
        self.query, self.key, self.value, self.mask = query, key, value, mask
        self.causal, self.scale = causal, scale
        output, self.lse = run_fused(query, key, value, mask, causal, scale)
        self.output, self.exact = output.transpose(1, 2), query.dtype == torch.float32

    def under(self, mask):
        """The same with a mask of its dtype."""
        return Fused(self.query, self.key, self.value, mask, False, self.scale)


def fused(call, null=False):
    """The `Fused` of a call, or None where its function is not torch's attention, or no kernel gives it.
    With ``null`` that of ``q = 0``."""
    call = attending(call, null)
    named, rest = arguments(call)
    query, key, value = (named[name].detach() for name in ("query", "key", "value"))
    mask, causal = named["attention_mask"], is_causal(named, rest) and query.shape[2] > 1
    ours = getattr(call[0], "__name__", "") == "sdpa_attention_forward"
    # That function takes these; it ignores what else models hand on.
    plain = not (rest.get("dropout") or rest.get("softcap") or rest.get("cache"))
    plain = plain and rest.get("position_bias") is None
    square = mask is not None or not causal or query.shape[2] == key.shape[2]
    same = query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % EXTRA == 0
    if not (ours and plain and square and same and kernel_for(query, mask, EXTRA)):
        return None
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        mask = mask.to(query.dtype)
    scale = rest.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if (share := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    query = torch.zeros_like(query) if null else query
    return Fused(query, key, value, mask, mask is None and causal, scale)


def kernel_for(query, mask, more=0):
    """Torch's operation that gives the log-sum-exp of a call with so many ``more`` head dimensions, None if
    there is none."""
    if query.device.type == "cpu":
        return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half and mask is None and query.shape[-1] + more <= 256:
        return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
    return None


def run_fused(query, key, value, mask, causal, scale):
    """The output ``[batch head query d_head]``, and the log-sum-exp of the logits of every query, ``[batch head
    query]`` in fp32."""
    masks, kernel = {} if mask is None else {"attn_mask": mask}, kernel_for(query, mask)
    if kernel is None:  # what is asked here is asked of calls that have one
        raise RuntimeError(
            "Got a call without a fused kernel; expected one that `kernel_for` knows."
        )
    found = kernel(query, key, value, 0.0, causal, **masks, scale=scale)
    return found[0], found[1][..., : query.shape[2]].float()


def column_sums(of, rows, state):
    """Sums of attention over the queries in ``rows`` ``[batch query]`` bool, ``[batch head key]`` in fp32. Keys
    that the mask hides from all queries may have any. What layers share is kept in ``state``."""
    if of.exact and of.lse.numel() * of.key.shape[2] <= SMALL:
        before = later_keys(of, state) if of.mask is None else of.mask.mT
        before = before - torch.where(rows[:, None], of.lse, -UNSEEN)[:, :, None]
        return run_fused(of.key, of.query, of.query, before, False, of.scale)[1].exp()
    bias = torch.where(rows[:, None], -of.lse / of.scale, UNSEEN)
    width, parts = of.query.shape[-1], 1 if of.exact else PARTS
    keys = torch.nn.functional.pad(of.key, (0, EXTRA))
    keys[..., width : width + parts] = 1.0
    queries = torch.nn.functional.pad(of.query, (0, EXTRA))
    for at in range(width, width + parts):
        queries[..., at] = bias
        bias = bias - queries[..., at]
    mask = None if of.mask is None else of.mask.mT
    if of.causal:
        keys, queries = keys.flip(2), queries.flip(2)
    # Values do not matter; torch's kernels want some of the keys' shape.
    found = run_fused(keys, queries, queries, mask, of.causal, of.scale)[1].exp()
    return found.flip(2) if of.causal else found


def later_keys(of, state):
    """Minus infinity where a query comes before the key, ``[key query]``; 0 where no key is hidden."""
    many, key = of.key.shape[2], ("later", of.causal, of.key.shape[2], of.key.dtype)
    if key not in state:
        every = torch.arange(many, device=of.key.device)
        empty = torch.zeros(many, many, dtype=of.key.dtype, device=of.key.device)
        hidden = empty.masked_fill_(every < every[:, None], float("-inf"))
        state[key] = hidden if of.causal else of.lse.new_zeros(())
    return state[key]


def own_weights(of):
    """The weight of every query on its own token's key, ``[batch head query]`` in fp32."""
    count = of.query.shape[2]
    logits = (of.query.float() * of.key[:, :, -count:].float()).sum(-1) * of.scale
    if of.mask is not None:
        logits = logits + of.mask[..., -count:].diagonal(dim1=-2, dim2=-1)
    return (logits - of.lse).exp()


def weights_on_key(of, at):
    """Weights on the key ``at`` ``[batch head]``, another one for every head, ``[batch head query]`` in fp32."""
    key = of.key.gather(2, at[..., None, None].expand(-1, -1, -1, of.key.shape[-1]))
    logits = (of.query.float() @ key.float().mT)[..., 0] * of.scale
    if of.mask is not None:
        mask = of.mask.expand(*of.key.shape[:2], -1, -1)
        logits = (
            logits + mask.gather(3, at[..., None, None].expand(-1, -1, mask.shape[2], -1))[..., 0]
        )
    if of.causal:
        later = at[..., None] > torch.arange(logits.shape[-1], device=at.device)
        logits = logits.masked_fill(later, float("-inf"))
    return (logits - of.lse).exp()
