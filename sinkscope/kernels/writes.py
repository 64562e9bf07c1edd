"""What a head writes into the residual stream: per key, and how many directions it uses."""

from __future__ import annotations

import torch

from sinkscope.kernels.attention import arguments, ask, spans, unpack


def head_writes(calls, state, projection, live, layout=None):
    """Per-head norm of every key's write, and the stable rank of every head's output.

    With ``u_j = W_O^h v_j`` and ``U = A u`` (Fesser et al. 2606.08105): ``||u_j||_2`` per key, and
    ``||U||_F^2 / sigma_1^2`` over the live queries, which is 1 if the head writes one direction only.

    Args:
        calls: The attention calls of one site.
        state: The run's scratch space (unused).
        projection: The output projection, weight ``[d_model, head * d_head]``.
        live: ``[batch query]`` bool in the model's layout.
        layout: ``[row pos]`` packed positions of a packed tower, or None.

    Returns:
        ``{"norms": [batch head key], "rank": [batch head]}``. In a packed tower the rank is taken
        over all images together and repeated for each.
    """
    norms, outputs, gram = [], [], None
    for call, (q_at, q_to, _, _) in zip(calls, spans(calls), strict=True):
        named, _ = arguments(call)
        value = named["value"].float()
        share = named["query"].shape[1] // value.shape[1]
        value = value.repeat_interleave(share, dim=1)
        if gram is None:
            weight = projection.weight.float()
            blocks = weight.reshape(weight.shape[0], value.shape[1], value.shape[3])
            gram = torch.einsum("ohd,ohe->hde", blocks, blocks)
        square = torch.einsum("bhkd,hde,bhke->bhk", value, gram, value)
        norms.append(square.clamp(min=0).sqrt())
        rows = live[:, q_at:q_to] if len(calls) > 1 else live[:, -(q_to - q_at) :]
        outputs.append(ask(call).float() * rows[:, :, None, None])
    written = torch.cat(outputs, dim=1)
    # U U^T and G^1/2 Y^T Y G^1/2 share their nonzero eigenvalues; the latter is d_head x d_head.
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    inner = torch.einsum("bqhd,bqhe->bhde", written, written)
    spectrum = torch.linalg.eigvalsh(torch.einsum("hdi,bhde,hej->bhij", root, inner, root)).clamp(
        min=0
    )
    rank = spectrum.sum(-1) / spectrum.amax(-1).clamp(min=1e-30)
    if layout is not None:
        rank = rank.expand(layout.shape[0], -1)
    return {"norms": unpack(torch.cat(norms, dim=2), layout, 2), "rank": rank}
