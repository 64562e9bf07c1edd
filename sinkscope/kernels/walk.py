"""The one loop that runs inside a trace: visit the sites in forward order, ask each its questions.

A plan is plain data, so that it can travel: a list of steps, one per site, each a dict with

* ``tower``, ``name``, ``layer``: the site;
* ``path``: the module whose input or output is read (``model.language_model.layers.3``);
* ``how``: ``"input"``, ``"output"`` or ``"attention"``;
* ``spatial``: whether states are ``[image row column d]``, read as ``[image pos d]``; may be absent;
* ``factors``: paths of numbers or parameters by which the model multiplies the output; may be absent;
* ``call``, ``bind``: labels of the attention call and of the callee's binding, for attention;
* ``fires``: ``"once"``, or ``"per window"`` when one forward pass calls several times;
* ``edits``, ``reads``: lists of ``(slot, kernel, parameters)``; reads see what the edits, in order, left;
* ``tokens``: rows and tokens of the sample, which states must have, and ``keys``, whether keys must; may be absent;
* ``measure``: whether edits measure the attention on the keys they edit; may be absent;
* ``stages``: the stage of every edit of attention; its kernel finds it in ``state["stage"]``.
"""

import torch

from sinkscope.kernels.attention import key_of, query_of
from sinkscope.kernels.edits import settle
from sinkscope.kernels.writes import proven


def locate(root, path):
    """The module or envoy at a dotted path, "" for the root, or the number or parameter; digits index lists."""
    owner = here = root
    for part in path.split(".") if path else ():
        owner, here = here, here[int(part)] if part.isdigit() else getattr(here, part)
    if getattr(here, "is_meta", False) is True:  # offloaded by accelerate between two passes
        hooks = getattr(owner._hf_hook, "hooks", [owner._hf_hook])
        maps = [getattr(one, "weights_map", None) for one in hooks]
        return next(one for one in maps if one is not None)[path.rpartition(".")[2]]
    return here


def first_tensor(value):
    """The tensor a module passes on: the value itself or the first of a tuple."""
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value


def check_tokens(step, what, shape, found):
    """RuntimeError if what is found at a site is not one row per batch row and one entry per token."""
    if "tokens" in step and tuple(found) != step["tokens"]:
        where = f"{step['path']}, where {step['name']} is read, has {what} {tuple(shape)}"
        raise RuntimeError(
            f"{where}; expected {step['tokens']} rows and tokens, as the sample has them. This site of this "
            "model cannot be read."
        )


class Place:
    """What a module is given, ``input``, and gives, ``output``: states are read and replaced here."""

    def __init__(self, input=None, output=None):
        self.input, self.output = input, output


def edit_call(step, call, span, state, out):
    """Apply the site's edits to one call, in the plan's order: the edited call."""
    before, device = call, query_of(call).device
    if span is None and step.get("keys"):
        shape = key_of(call).shape
        check_tokens(step, "keys of the shape", shape, (shape[0], shape[2]))
    for (slot, kernel, parameters), stage in zip(step["edits"], step["stages"], strict=True):
        place = (slot, step["tower"], step["name"], step["layer"])
        state |= {"edit": place, "stage": stage, "unedited": before}
        state["measure"] = step.get("measure", True)
        call, effect = kernel(call, state, span, **resolve(None, parameters, device, state))
        note_effect(out, slot, step, effect)
    return call


def note_effect(out, slot, step, effect):
    """Add an effect to those of the same edit at the same site (one per window); a look has none."""
    if effect is not None:
        key, effect = (step["tower"], step["name"], step["layer"]), detached(effect)
        found = out.setdefault(("edit", slot), {})
        if key in found:
            effect = {name: found[key][name] + value for name, value in effect.items()}
        found[key] = effect


def factors_at(root, paths, device):
    """The numbers or parameters by which the model multiplies, where the value is."""
    found = [locate(root, path) for path in paths]
    return [factor.to(device) if torch.is_tensor(factor) else factor for factor in found]


def times(value, factors):
    """Factor by factor, as the model multiplies."""
    for factor in factors:
        value = value * factor
    return value


def read_site(root, tracer, step, state, out):
    """The value at a site of a trace after its edits: states, or the attention calls, one per window, in
    order. Edits replace the callee where the module binds it, so the model itself calls the edited function.
    RuntimeError if the source is not as the anatomy says, or the windows do not tile the sequence."""
    here = locate(root, step["path"])
    if step["how"] != "attention":
        return read_states(root, here, step, state, out)
    source, once = here.source, step["fires"] == "once"
    length = None if once else first_tensor(here.input).shape[:-1].numel()
    function, calls, covered = getattr(source, step["bind"]).output, [], 0
    if not callable(function):
        raise RuntimeError(
            f"{step['path']}: {step['bind']} holds {type(function).__name__}; expected the "
            "attention function. The model's source does not match its anatomy."
        )
    now = {"function": function}
    if step["edits"]:
        getattr(source, step["bind"]).output = lambda *a, **k: now["function"](*a, **k)
    for _ in (0,) if once else tracer.iter[:]:
        before = call = (function, *getattr(source, step["call"]).inputs)
        span = None if once else (covered, covered + query_of(call).shape[2])
        call = edit_call(step, call, span, state, out)
        now["function"] = call[0]
        if call[1] is not before[1] or call[2] is not before[2]:
            getattr(source, step["call"]).inputs = (call[1], call[2])
        calls.append(call)
        covered = span[1] if span else length
        if covered is None or covered >= length:
            break
    check_windows(step, covered, length)
    return calls


def check_windows(step, covered, length):
    """RuntimeError if the windows of a module do not cover its tokens."""
    if covered != length:
        raise RuntimeError(
            f"The attention windows of {step['path']} cover {covered} tokens; expected {length}."
        )


def read_states(root, here, step, state, out):
    """The states at a site after its edits, where ``here`` is what a module is given and gives."""
    value = first_tensor(here.input if step["how"] == "input" else here.output)
    if step.get("spatial"):
        value = value.flatten(1, 2)
    if step["name"] != "mlp_hidden":
        check_tokens(step, "states of the shape", value.shape, value.shape[:-1])
    factors = factors_at(root, step.get("factors", ()), value.device)
    return edit_value(here, step, value, factors, state, out)


def edit_value(here, step, value, factors, state, out):
    """Apply the site's edits to states, in the plan's order, and hand the result to the model."""
    # Where the model multiplies behind the site, the product is edited and handed over divided.
    old = new = state["unedited"] = times(value, factors)
    for slot, kernel, parameters in step["edits"]:
        new, effect = kernel(new, state, **resolve(here, parameters, value.device, state))
        note_effect(out, slot, step, effect)
    if new is old:
        return old
    divided = new
    for factor in factors:
        divided = divided / factor
    new = torch.where(new == old, value, divided) if factors else new
    if step["how"] == "input":
        here.input = new.reshape(first_tensor(here.input).shape) if step.get("spatial") else new
        return new
    whole = here.output
    given = new.reshape(first_tensor(whole).shape) if step.get("spatial") else new
    here.output = (given, *whole[1:]) if isinstance(whole, tuple) else given
    return times(new, factors)


def resolve(root, parameters, device, state):
    """Parameters ready for a kernel: modules looked up, tensors on the site's device.
    ``("@module", path)`` stands for the module at that path, ``("@modules", paths)`` for several, or for
    parameters and numbers. A tensor is moved once per run: kernels may compare it by identity."""
    placed, out = state.setdefault("placed", {}), {}
    for name, value in parameters.items():
        mark = value[0] if isinstance(value, tuple) and value and isinstance(value[0], str) else ""
        if mark == "@module":
            path, value = value[1], locate(root, value[1])
            state.setdefault("paths", {})[id(value)] = path  # for messages
        elif mark == "@modules":
            value = [locate(root, path) for path in value[1]]
        elif hasattr(value, "device"):
            key = (id(value), device)
            if key not in placed:
                placed[key] = value.to(device)
            value = placed[key]
        out[name] = value
    return out


def detached(value, of=None):
    """The same nested value with every tensor cut from the graph; a view of the tensor ``of`` becomes a copy."""
    if isinstance(value, dict):
        return {key: detached(part, of) for key, part in value.items()}
    value = value.detach() if value.requires_grad else value
    # The model may go on to change its own tensor in place.
    own = of is None or value.untyped_storage().data_ptr() != of.untyped_storage().data_ptr()
    return value if own else value.clone()


HELD = 2**28  # bytes of answers that may wait on a device for the end of the pass


def tensors_in(value):
    """The tensors of a nested value."""
    for part in value.values() if isinstance(value, dict) else ():
        yield from tensors_in(part)
    if torch.is_tensor(value):
        yield value


def brought(value):
    """The same nested value in the memory of the CPU. Copies from a GPU are all begun, then waited for once.
    What several answers share stays one tensor, and a view is cut from the rest: a file holds whole storages."""
    busy, known = set(), {}

    def bring(x):
        if isinstance(x, dict):
            return {key: bring(part) for key, part in x.items()}
        if id(x) not in known:
            known[id(x)] = fetch(x)
        return known[id(x)]

    def fetch(x):
        if getattr(x.device, "type", "") == "cuda":
            busy.add(x.device)
            return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        x = x.cpu()
        view = torch.is_tensor(x) and x.untyped_storage().nbytes() > x.nbytes
        return x.clone() if view else x

    value = bring(value)
    for device in busy:
        torch.cuda.current_stream(device).synchronize()
    return value


def ask(root, step, value, state, out):
    """Ask a site all its questions; answers stay where they are, and come over when many have gathered."""
    key = (step["tower"], step["name"], step["layer"])
    of = None if isinstance(value, list) else value
    device = (query_of(value[0]) if of is None else value).device
    for slot, kernel, parameters in step["reads"]:
        answer = detached(kernel(value, state, **resolve(root, parameters, device, state)), of)
        out.setdefault(slot, {})[key] = answer
        if device.type != "cpu":
            state["held"] = state.get("held", 0) + sum(x.nbytes for x in tensors_in(answer))
    if state.get("held", 0) > HELD:
        settle(out, state)
        out |= brought(out)
        state["held"] = 0


def walk(root, tracer, plan, number=0, memory=None):
    """Run a plan in a trace: ``{slot: {(tower, name, layer): answer}}``, effects under ``("edit", slot)``.
    ``number`` is that of the step, 0 for the prompt; ``memory`` is what edits keep from step to step."""
    out, state = {}, {"step": number, "memory": {} if memory is None else memory}
    for step in plan:
        value = read_site(root, tracer, step, state, out)
        ask(root, step, value, state, out)
    proven(state)
    settle(out, state)
    return brought(out)


class Saying:
    """A logits processor: ``generate`` says ``tokens`` ``[batch n]`` behind a prompt of ``start`` positions, and
    then the last of them again. It travels, where those of transformers may not be loaded."""

    def __init__(self, tokens, start):
        self.tokens, self.start = tokens, start

    def __call__(self, ids, scores):
        """Scores that leave one token for each row."""
        step = min(ids.shape[1] - self.start, self.tokens.shape[1] - 1)
        only = torch.full_like(scores, -float("inf"))
        return only.scatter(1, self.tokens[:, step, None].to(scores.device), 0.0)


def last_logits(logits, last=None, graph=False):
    """Logits ``[batch pos vocab]`` of all positions, or of ``last``; ``graph`` keeps the graph."""
    if last is not None:
        rows = torch.arange(logits.shape[0], device=logits.device)
        logits = logits[rows, last.to(logits.device)][:, None]
    return logits if graph else logits.detach().cpu()
