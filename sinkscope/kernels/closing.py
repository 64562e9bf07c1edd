"""What a pass is asked when all layers are done: answers reduced where the model is, so that little is sent.

Kernels wrapped by `gathered` leave their answers in ``state``. At the last of their sites `close_language`
or `close_vision` makes of them what a trace reads of every token, with all numbers ``[batch layer ...]``.
"""

import torch

from sinkscope.kernels.walk import detached
from sinkscope.kernels.writes import over_others


def gathered(value, state, kernel, part, at, full=False, **parameters):
    """Ask a kernel and leave its answer in ``state``, as that of layer ``at`` in a ``part``; with ``full`` it is
    sent too."""
    of = None if isinstance(value, list) else value
    answer = detached(kernel(value, state, **parameters), of)
    state.setdefault("gathered", {}).setdefault(part, {})[at] = answer
    return answer if full else {}


def stacked(found, name=None):
    """One number of the answers of all layers, in their order, on the device of the first."""
    values = [found[at] if name is None else found[at][name] for at in sorted(found)]
    return torch.stack([value.to(values[0].device) for value in values], dim=1)


def by_key(received, others, others_null):
    """What is kept of attention received by head, ``[batch layer head key]``, for every key.

    Mean and largest of the heads with the head; of ``others``, which other tokens give, what the head gives
    that gives most beyond uniform attention, with the head; and ``times``, the mean over heads in multiples
    of uniform attention, of the layer where that is largest, ``[batch key]``. All but it ``[batch layer
    key]``.
    """
    most, most_head = received.max(dim=2)
    head = (others - others_null[:, :, None]).nan_to_num(nan=-2.0).argmax(dim=2)
    times = (others / others_null[:, :, None]).nan_to_num().mean(dim=2)
    return {
        "mean": received.mean(dim=2),
        "most": most,
        "most_head": most_head,
        "drawn": others.gather(2, head[:, :, None])[:, :, 0],
        "head": head,
        "times": torch.nn.functional.pad(times, (0, 0, 1, 0)).amax(dim=1),  # there may be no layer
    }


def attention_of(found, least):
    """What all keys receive, stacked over layers: NaN from others where fewer than ``least`` see the key."""
    few = stacked(found, "seeing") < least
    others = stacked(found, "others").masked_fill(few[:, :, None], float("nan"))
    null = stacked(found, "others_null").masked_fill(few, float("nan"))
    return stacked(found, "received"), others, null


def small(x):
    """Whole numbers in the smallest type that holds numbers up to the largest of them."""
    most = int(x.max()) if x.numel() else 0
    fitting = torch.uint8 if most < 2**8 else torch.int16 if most < 2**15 else torch.int32
    return x.to(fitting)


def once(x):
    """``[batch layer key]`` without repetitions: the different ones ``[batch few key]``, and which of them
    each layer has."""
    kept, which = [], []
    for one in x.nan_to_num(-1.0).unbind(1):
        at = next((i for i, other in enumerate(kept) if torch.equal(one, other)), len(kept))
        kept += [one] if at == len(kept) else []
        which.append(at)
    first = [which.index(i) for i in range(len(kept))]
    return {"values": x[:, first], "which": torch.tensor(which, dtype=torch.uint8)}


def spikes(massive):
    """The largest channel of every token and the median of every layer."""
    names = {name: stacked(massive, name) for name in ("values", "channels", "median")}
    return {**names, "values": names["values"][..., 0], "channels": names["channels"][..., 0]}


def at_layer(values, layer):
    """Of ``[batch layer pos any]`` those of a layer for each token, ``[batch pos]``."""
    index = layer[:, None, :, None].expand(-1, 1, -1, values.shape[-1])
    return values.gather(1, index)[:, 0]


def close_language(value, state, live, least, keep, full=False):
    """What a trace reads of the tokens of the prompt; unless ``full`` also what stands for the answers that
    stay. ``keep`` tokens, those that draw most, have what they receive by head.
    ``live`` is ``[batch pos]``, and ``least`` how many others must see a key."""
    found = state["gathered"]
    massive, attention = found["language states"], found.get("language attention")
    values, channels = stacked(massive, "values"), stacked(massive, "channels")
    layer = values[..., 0].abs().argmax(dim=1)
    out = {"values": at_layer(values, layer), "channels": at_layer(channels, layer)}
    if "more" in found:
        out["wrote"] = stacked(found["more"]) > 0
    if not full:
        first = {name: massive[0][name] for name in ("values", "channels", "median")}
        out |= {"first": first, "spikes": spikes(massive)}
    if attention is None:
        return out
    received, others, null = attention_of(attention, least)
    keys = by_key(received, others, null)
    known = (keys["drawn"] - null).nan_to_num(nan=-2.0)
    heads = found.get("writes", {})
    out |= at_head(heads, sorted(attention), received, keys["head"], known, live)
    if not full:
        kept = known.amax(dim=1).topk(min(keep, known.shape[2])).indices
        where = kept[:, None, None].expand(-1, *received.shape[1:3], -1)
        keys |= {"kept": kept, "by_head": received.gather(3, where)}
        keys |= {name: stacked(attention, name) for name in ("sink", "sink_mass", "routed")}
        out["attention"] = lean(keys, attention, null)
    return out


def lean(keys, attention, null):
    """The numbers of `by_key` with small whole numbers and every null once."""
    whole = ("most_head", "head", "kept", "sink")
    out = {name: small(x) if name in whole else x for name, x in keys.items()}
    return {**out, "null": once(stacked(attention, "null")), "others_null": once(null)}


def at_head(heads, layers, received, head, known, live):
    """Of every token at the layer and head where others give it most beyond uniform attention: what it
    receives, the norm of what it writes, the same over the mean of other tokens, and the head's stable rank;
    NaN where writes are not known. ``known`` is ``[batch layer key]``, all others ``[batch key]``."""
    layer = known.argmax(dim=1)
    rows, keys = (torch.arange(size, device=layer.device) for size in layer.shape)
    rows, head = rows[:, None], head.gather(1, layer[:, None])[:, 0]
    out = {"received": received[rows, layer, head, keys]}
    nothing = torch.full_like(out["received"], float("nan"))
    if not heads:
        return {**out, "norm": nothing, "ratio": nothing, "rank": nothing}
    writing = sorted(heads)
    at = torch.tensor([writing.index(x) if x in writing else -1 for x in layers])
    at = at.to(layer.device)[layer]
    norms, rank = (stacked(heads, name).to(layer.device) for name in ("norms", "stable_rank"))
    norms = norms.masked_fill(~live.to(norms.device)[:, None, None], float("nan"))
    some = {"norm": norms[rows, at, head, keys], "ratio": over_others(norms)[rows, at, head, keys]}
    some["rank"] = rank[rows, at, head]
    return out | {name: torch.where(at < 0, nothing, x) for name, x in some.items()}


def close_vision(value, state, feed, halves, least, full=False):
    """What a trace reads of ViT tokens: their largest channels in block ``feed``, and of every block in
    ``halves`` whether its attention writes more into the largest of these than its MLP."""
    found = state["gathered"]
    massive, attention = found["vision states"], found.get("vision attention")
    out = {"values": massive[feed]["values"], "channels": massive[feed]["channels"]}
    if halves:
        top, sizes = out["channels"][..., :1], []
        for half in halves:
            values, channels = (stacked(found[half], name) for name in ("values", "channels"))
            same = channels == top[:, None].to(channels.device)
            sizes.append((values.abs() * same).sum(dim=-1))
        out["wrote"] = sizes[0] > sizes[1].to(sizes[0].device)
    if full:
        return out
    out["spikes"] = spikes(massive)
    if attention is not None:
        received, others, null = attention_of(attention, least)
        keys = by_key(received, others, null)
        out["attention"] = lean({name: keys[name] for name in ("drawn", "head")}, attention, null)
    return out
