"""The field's measures: each paper's formula in plain torch, against `sinkscope.published`.

    python scripts/compare_measures.py

The formulas below use PyTorch and Hugging Face's eager modules only, and nothing of sinkscope. The table is
of the example model (DINOv2-S, a projector, SmolLM2-135M) on photographs and a drawn scene.
"""

import sys
from contextlib import contextmanager

import torch

# --- formulas -----------------------------------------------------------------------------------------


def alpha(weights, length):
    """Gu et al.: mean attention that key k gets from queries k..T, of ``[layer head T T]``."""
    a = weights[..., :length, :length]
    return torch.stack([a[..., k:, k].mean(-1) for k in range(length)], dim=-1)


def massive(states, absolute=100, ratio=1000):
    """Sun et al.: (layer, token, channel) of ``|h| > 100`` and at least 1000 medians, of ``[layer T D]``."""
    found = {}
    for layer, h in enumerate(states):
        size = h.abs()
        hit = (size > absolute) & (size >= ratio * size.median())
        found |= {(layer, *at): float(h[tuple(at)]) for at in hit.nonzero().tolist()}
    return found


def phi(h, dims):
    """Kang et al.: the largest sink channel over the root mean square of the state."""
    return h[..., list(dims)].abs().amax(-1) / (h.pow(2).mean(-1) + 1e-6).sqrt()


def head_of(weights, values, matrix, gamma):
    """Fesser et al., of one head: ``A [N N]``, ``v [N d]``, ``W_O [D d]``, ``gamma [D]``; causal if A is."""
    sink = int(weights.mean(0).argmax())
    sees = torch.arange(len(weights)) >= (sink if bool((weights.triu(1) == 0).all()) else 0)
    column, u = weights[sees, sink], values @ matrix.T * gamma
    other = torch.arange(len(values)) != sink
    out = (weights @ u).double()
    energy = torch.linalg.eigvalsh(out @ out.T)  # the squared singular values
    return {
        "sink": sink,
        "mass": float(column.mean()),
        "routed": float((column >= 0.5).float().mean()),
        "ratio_head": float(values[sink].norm() / values[other].norm(dim=-1).mean()),
        "ratio_out": float(u[sink].norm() / u[other].norm(dim=-1).mean()),
        "stable_rank": float(energy.sum() / energy[-1]),
    }


def label(head):
    """Their words, for a head with a sink event."""
    if head["routed"] < 0.9:
        return "no event"
    if head["ratio_out"] <= 0.2:
        return "NOP"
    return "broadcast" if head["ratio_out"] >= 0.5 and head["stable_rank"] <= 1.5 else "mixed"


def redistribute(weights, sinks, image, p, rho, version):
    """VAR on one layer's ``[head T T]``: rows behind the image that look at it and not at its sinks."""
    after = torch.arange(len(image)) > image.nonzero().max()
    visual, rest = weights[..., image], image & ~sinks
    if version == "paper":
        clean = weights[..., rest].sum(-1) / visual.sum(-1) >= rho
        kept, given = 1 - p, p
    else:
        clean = weights[..., image & sinks].sum(-1) / (visual + 1e-6).sum(-1) <= rho
        clean = clean & (image & sinks).any()
        kept, given = p, 1 - p
    new = weights.clone()
    new[..., sinks] *= kept
    budget = given * weights[..., sinks].sum(-1, keepdim=True)
    new[..., rest] += budget * weights[..., rest] / weights[..., rest].sum(-1, keepdim=True)
    chosen = (visual.sum(-1) >= 0.2) & clean & after
    return torch.where(chosen[..., None], new, weights)


def edited_value(name, weights, values, sink, other, donors):
    """The five edits and the control of one head: new ``[N N]`` weights and ``[N d]`` values."""
    weights, values = weights.clone(), values.clone()
    if name == "redirect":
        weights[:, sink] = 0
        weights = weights / weights.sum(-1, keepdim=True)
    elif name == "control":
        values[other] = 0
    else:
        values[sink] = {"zero": 0 * values[sink], **donors}[name]
    return weights, values


# --- Hugging Face -------------------------------------------------------------------------------------


def tower_of(model, tower):
    """The vision model or the decoder of a LLaVA, its blocks, and their attention modules."""
    inner = model.model.vision_tower if tower == "vision" else model.model.language_model
    lists = [m for n, m in inner.named_modules() if n.endswith(("layers", "layer"))]
    blocks = [*lists[0]]
    return inner, blocks, [getattr(b, "self_attn", None) or b.attention for b in blocks]


@contextmanager
def hooks(*made):
    """Hooks that are there until the block ends."""
    try:
        yield
    finally:
        for hook in made:
            hook.remove()


def first(out):
    """The states of a block's output."""
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def eager(model, inputs, tower):
    """Attention ``[layer head T T]``, block outputs and inputs ``[layer T D]``, values ``[layer head T d]``."""
    inner, blocks, attention = tower_of(model, tower)
    before, states, read, values = model.config._attn_implementation, [], [], []
    model.set_attn_implementation("eager")
    made = [b.register_forward_hook(lambda m, a, out: states.append(first(out)[0])) for b in blocks]
    made += [
        b.register_forward_pre_hook(
            lambda m, a, kw: read.append((a[0] if a else kw["hidden_states"])[0]), with_kwargs=True
        )
        for b in blocks
    ]
    made += [
        a.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0])) for a in attention
    ]
    with hooks(*made):
        if tower == "vision":
            out = inner(inputs["pixel_values"], output_attentions=True)
        else:
            out = model(**inputs, output_attentions=True)
    model.set_attn_implementation(before)
    weights = torch.stack([a[0] for a in out.attentions])
    width = inner.config.hidden_size // inner.config.num_attention_heads
    shape = [v.unflatten(-1, (-1, width)).transpose(0, 1) for v in values]
    values = torch.stack([v.repeat_interleave(weights.shape[1] // len(v), 0) for v in shape])
    return weights, torch.stack(states), torch.stack(read), values


@torch.no_grad()
def heads_of(model, inputs, tower, scaled=True):
    """`head_of` every (layer, head); with ``scaled=False`` LayerScale is left out."""
    weights, _, _, values = eager(model, inputs, tower)
    _, blocks, attention = tower_of(model, tower)
    out = {}
    for layer, (block, attn) in enumerate(zip(blocks, attention, strict=True)):
        matrix = (getattr(attn, "o_proj", None) or attn.out_proj).weight
        gamma = torch.ones(len(matrix))
        if scaled and hasattr(block, "layer_scale1"):
            gamma = block.layer_scale1.lambda1
        for head, part in enumerate(matrix.split(values.shape[-1], dim=1)):
            out[layer, head] = head_of(weights[layer, head], values[layer, head], part, gamma)
    return out


@contextmanager
def attention_as(model, tower, change):
    """Eager attention whose ``(weights, values)`` ``[head T T]``, ``[head T d]`` pass ``change(layer, ...)``."""
    inner, _, attention = tower_of(model, tower)
    library = sys.modules[type(inner).__module__]
    plain, before = library.eager_attention_forward, model.config._attn_implementation

    def forward(module, query, key, value, mask, *args, **kwargs):
        out, weights = plain(module, query, key, value, mask, *args, **kwargs)
        if module not in attention:
            return out, weights
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
        new, value = change(attention.index(module), weights[0], value[0])
        return (new @ value).transpose(0, 1)[None], new[None]

    library.eager_attention_forward = forward
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        library.eager_attention_forward = plain
        model.set_attn_implementation(before)


def value_states(model, inputs, layer, head, name, sink, other, donors):
    """The vision tower's last block's output ``[T D]`` under one of the edits of a head's value."""
    inner, blocks, _ = tower_of(model, "vision")
    seen = []

    def change(at, weights, values):
        if at == layer:
            weights, values = weights.clone(), values.clone()
            edited = edited_value(name, weights[head], values[head], sink, other, donors)
            weights[head], values[head] = edited
        return weights, values

    keep = blocks[-1].register_forward_hook(lambda m, a, out: seen.append(first(out)[0]))
    with attention_as(model, "vision", change), hooks(keep):
        inner(inputs["pixel_values"])
    return seen[0]


@torch.no_grad()
def var_logits(model, inputs, image, dims, tau, p, rho, version, least=2):
    """Logits under VAR: sinks of the unedited pass (paper), or of what each edited layer reads (code)."""
    _, blocks, _ = tower_of(model, "language")
    reads = [*eager(model, inputs, "language")[2]]

    def see(layer):
        def hook(module, args, kwargs):
            if version == "code":
                reads[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return hook

    def change(layer, weights, values):
        sinks = phi(reads[layer], dims) > tau
        if layer < least or not sinks.any():
            return weights, values
        return redistribute(weights, sinks, image, p, rho, version), values

    seen = [b.register_forward_pre_hook(see(i), with_kwargs=True) for i, b in enumerate(blocks)]
    with attention_as(model, "language", change), hooks(*seen):
        return model(**inputs).logits


@torch.no_grad()
def neuron_scores(model, inputs, outliers, max_layer):
    """Jiang et al.: mean ``|activation|`` over outliers of every neuron, ``[layer neuron]``."""
    inner, blocks, _ = tower_of(model, "vision")
    seen = []
    made = [
        b.mlp.fc2.register_forward_pre_hook(lambda m, a: seen.append(a[0][0]))
        for b in blocks[: max_layer + 1]
    ]
    with hooks(*made):
        inner(inputs["pixel_values"])
    return torch.stack([x[outliers].abs().mean(0) for x in seen])


@torch.no_grad()
def register_logits(model, inputs, neurons, last, version):
    """Logits with one register: a zero token that takes each neuron's largest activation from the others."""
    _, blocks, _ = tower_of(model, "vision")

    def append(module, args, kwargs):
        states = args[0] if args else kwargs.pop("hidden_states")
        longer = torch.cat([states, torch.zeros_like(states[:, :1])], dim=1)
        return (longer, *args[1:]), kwargs

    def shift(chosen):
        def hook(module, args):
            x = args[0].clone()
            for n in chosen:
                own = args[0][:, :-1, n] if version == "paper" else args[0][..., chosen].flatten(1)
                x[:, -1, n] = own.gather(1, own.abs().argmax(1, keepdim=True))[:, 0]
                x[:, (0 if version == "paper" else 1) : -1, n] = 0
            return (x,)

        return hook

    def drop(module, args, out):
        return (out[0][:, :-1], *out[1:]) if isinstance(out, tuple) else out[:, :-1]

    made = [blocks[0].register_forward_pre_hook(append, with_kwargs=True)]
    made += [blocks[at].mlp.fc2.register_forward_pre_hook(shift(n)) for at, n in neurons.items()]
    made += [blocks[last].register_forward_hook(drop, prepend=True)]
    with hooks(*made):
        return model(**inputs).logits


# --- the table ----------------------------------------------------------------------------------------


def main():
    """Print the table, in markdown."""
    import sinkscope as ss
    from benchmarks.example_detection import SENTENCE, photo
    from sinkscope import published

    lvlm, scene = ss.load_example(progress=False), ss.bundled.draw_scene(11_000_005).image
    model, text = lvlm.module, {"text": SENTENCE * 6 + "<image>", "rendered": True}
    sample = lvlm.prepare(images=photo("china.jpg"), text="What is in the picture?")
    drawn = lvlm.prepare(images=scene, text="how many shapes are there?")
    inputs, rows = sample.inputs, []

    def add(measure, paper, quantity, plain, ours, difference):
        numbers = [f"{x:.5g}" if isinstance(x, float) else str(x) for x in (plain, ours)]
        rows.append([measure, paper, quantity, *numbers, f"{float(difference):.1e}"])

    words = lvlm.prepare(images=photo("china.jpg"), **text)
    ids, got = words.inputs["input_ids"][:, :64], published.sink_rate(lvlm, words)
    own = alpha(eager(model, {"input_ids": ids}, "language")[0], 64)
    rate = float((own[..., 0] > 0.3).float().mean())
    where = "Gu 2410.10781"
    add(
        "`sink_rate`",
        where,
        "Sink_1, text of 64 tokens",
        rate,
        got.first,
        (own - got.alpha[0]).abs().max(),
    )

    _, states, read, _ = eager(model, inputs, "language")
    own, got = massive(states), published.massive_activations(lvlm, sample)
    ours = {
        tuple(x[:3]): x[3] for x in got.to_dataframe()[["layer", "pos", "channel", "value"]].values
    }
    same = own.keys() == ours.keys()
    off = max(abs(own[at] - ours[at]) / abs(own[at]) for at in own) if same else 1.0
    add("`massive_activations`", "Sun 2402.17762", "how many", len(own), len(ours), off)

    norms = eager(model, inputs, "vision")[1][-1].norm(dim=-1)
    tau, got = float(norms.quantile(0.9)), published.outlier_tokens(lvlm, sample, tau=150.0)
    add("`outlier_tokens`", "Darcet 2309.16588", "patches over 150", int((norms[1:] > 150).sum()),
        int(got.outliers.sum()), (norms - got.norms[0]).abs().max())  # fmt: skip
    got = published.outlier_tokens(lvlm, sample, tau=tau)
    add(
        "",
        "",
        f"patches over {tau:.1f}",
        int((norms[1:] > tau).sum()),
        int(got.outliers.sum()),
        0.0,
    )

    plain = lvlm.run(sample).logits
    dims, image, where = [507], sample.tokens.image[0] >= 0, "Kang 2503.03321"
    own, got = phi(read, dims), published.var(lvlm, sample, dims)
    flagged = int((own[2:] > 20).sum()), int(got.sinks.sum())
    add("`var`", where, "(layer, token) with phi > 20", *flagged, (own - got.phi[0]).abs().max())
    for version, tau, rho in (("paper", 20.0, 0.8), ("code", 1.2, 0.5)):
        got = published.var(lvlm, sample, dims, version=version, tau=tau)
        want = var_logits(model, inputs, image, dims, tau, 0.6, rho, version)
        ours = lvlm.run(sample, (), [got.edit()]).logits
        moved = float((want - plain).abs().max()), float((ours - plain).abs().max())
        add("", "", f"logits moved, {version}, tau {tau:g}", *moved, (want - ours).abs().max())

    where = "Fesser 2606.08105"
    for name, tower, one in (
        ("photo", "vision", sample),
        ("scene", "vision", drawn),
        ("photo", "language", sample),
    ):
        own = heads_of(model, one.inputs, tower)
        table = published.nop_broadcast(lvlm, one, tower=tower).to_dataframe()
        ours = {(x.layer, x.head): x for x in table.itertuples()}
        events = [sum(x["routed"] >= 0.9 for x in own.values()), int(table.event.sum())]
        fields = ("mass", "routed", "ratio_head", "ratio_out", "stable_rank")
        off = max(
            abs(own[at][f] - getattr(ours[at], f)) / own[at][f]
            for at in own
            for f in fields
            if own[at][f]
        )
        same = all(label(own[at]) == ours[at].label for at in own)
        add(
            "`nop_broadcast`",
            where,
            f"heads with an event, {tower}, {name}",
            *events,
            off if same else 1.0,
        )
        if tower == "vision":
            bare = heads_of(model, one.inputs, tower, scaled=False)
            always = [
                {at: label({**x, "routed": 1.0}) for at, x in both.items()} for both in (own, bare)
            ]
            flips = sum(always[0][at] != always[1][at] for at in own)
            worst = max(abs(bare[at]["ratio_out"] / own[at]["ratio_out"] - 1) for at in own)
            probe = ss.ReceivedAttention(tower=tower)
            seen = lvlm.run(one, [probe], logits="last")[probe]
            drawn = int((seen.received > 3 * seen.null[:, :, None]).any(dim=-1).sum())
            print(f"{name}: {drawn} of {len(own)} heads give some key three times uniform attention, "
                  f"{events[1]:.0f} have a sink event.")  # fmt: skip
            print(f"{name}: of {len(own)} heads {flips} words differ without LayerScale, events ignored; "
                  f"ratio_out is off by up to {worst:.0%}.")  # fmt: skip

    tau, cap, where = float(norms[1:].quantile(0.97)), 8, "Jiang 2506.08010"
    got = published.test_time_registers(lvlm, [sample], norm=tau, max_layer=cap, top_k=10)
    scores = neuron_scores(model, inputs, (norms > tau) & (torch.arange(len(norms)) > 0), cap)
    top = scores.flatten().topk(10)
    own = {divmod(at, scores.shape[1]) for at in top.indices.tolist()}
    ours = {(layer, n) for layer, chosen in got.neurons.items() for n in chosen}
    add(
        "`test_time_registers`", where, "register neurons in common", len(own), len(own & ours), 0.0
    )
    last = lvlm.anatomy.feed_layers[-1]
    for version in ("paper", "code"):
        given = {"norm": tau, "max_layer": cap, "top_k": 10, "version": version}
        edit = published.test_time_registers(lvlm, [sample], **given).edit()
        want = register_logits(model, inputs, got.neurons, last, version)
        ours = lvlm.run(sample, (), [edit]).logits
        moved = float((want - plain).abs().max()), float((ours - plain).abs().max())
        add("", "", f"logits moved, {version}", *moved, (want - ours).abs().max())

    heads = ["measure", "paper", "quantity", "plain torch", "sinkscope", "largest difference"]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * 6, *rows]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
