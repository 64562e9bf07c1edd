"""Plain forward hooks: what the map says is compared with what the model itself does."""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image


class Reached(Exception):  # noqa: N818  a signal, not an error
    """The states that were wanted are there; the rest of the pass is not needed."""


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def states_before(lvlm, path, inputs):
    """The states that the module at ``path`` reads; the pass ends there."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    with torch.no_grad(), hooked(lvlm.module.get_submodule(path), keep):
        try:
            lvlm.module(**inputs)
        except Reached:
            return seen[0].detach().clone()
    raise AssertionError(f"{path} did not run")


def vit_states(lvlm, sample):
    """What vision block 0 reads, ``[image pos d_model]`` in the order of the TokenMap."""
    states = states_before(lvlm, lvlm.anatomy.vision.blocks[0], sample.inputs)
    layout = sample.tokens.vision.layout
    return states if layout is None else states[layout.clamp(min=0)]


def llm_states(lvlm, sample):
    """What language block 0 reads, ``[batch pos d_model]``."""
    return states_before(lvlm, lvlm.anatomy.language.blocks[0], sample.inputs)


def llm_states_after_disturbing(lvlm, sample, image, token):
    """The same with one ViT token changed where it enters the projector."""
    anatomy, layout = lvlm.anatomy, sample.tokens.vision.layout

    def disturb(module, args, kwargs):
        states = args[0].clone()
        if layout is None:
            states[image, token - anatomy.drops] += 5.0
        else:
            states[layout[image, token]] += 5.0
        return (states, *args[1:]), kwargs

    with hooked(lvlm.module.get_submodule(anatomy.projector), disturb):
        return llm_states(lvlm, sample)


def changed(before, after):
    """The ``(row, position)`` pairs at which two states differ."""
    return {tuple(place) for place in (before != after).any(dim=-1).nonzero().tolist()}


def inverted(image, box):
    """A copy of the image with the colours inside ``x0 y0 x1 y1`` inverted."""
    pixels = np.array(image)
    x0, y0, x1, y1 = (round(edge) for edge in box)
    pixels[y0:y1, x0:x1] = 255 - pixels[y0:y1, x0:x1]
    return Image.fromarray(pixels)
