"""Scale the keys of chosen blocks in a plain forward pass, without nnsight.

The attention module gets a shallow copy of its config, with a name of our own for the function it
looks up: that edits the keys after RoPE and k-norm, and calls the model's own kernel. The cache keeps
clean keys, and head dimensions that a trace adds for a bias of the logits stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import check_whole
from sinkscope.errors import AttentionCallError, LayerError

KeyEdit = Callable[[Tensor], Tensor]
PassEdit = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""Keys, and what else the attention function was called with by name, to keys."""
NUMBERS = count()
Shared = tuple[list[PassEdit], Callable[[], None]]
SHARED: WeakKeyDictionary[nn.Module, Shared] = WeakKeyDictionary()
"""By attention module: the edits of `share_keys`, and what ends them all."""


@contextmanager
def scaled_keys(
    module: nn.Module, anatomy: Anatomy, edits: Mapping[int, KeyEdit]
) -> Iterator[None]:
    """Edit the keys of decoder blocks until the block ends; of nested contexts the inner edits first.

    ``edits`` are functions, by block index, of the keys ``[row kv_head key d_head]`` (the whole cache) to
    keys of the same shape, which must not write into their argument.

    LayerError if there is no such block; AttentionCallError if one has no attention registry.
    """
    hint = "Write {10: lambda key: 0.5 * key} to halve the logits of block 10."
    for block in edits:
        check_whole(0, anatomy.language.n_layers - 1, error=LayerError, hint=hint, block=block)
    with ExitStack() as stack:
        for block, edit in edits.items():
            stack.callback(_redirect(module, anatomy, block, lambda key, _, edit=edit: edit(key)))
        yield


def share_keys(
    module: nn.Module, anatomy: Anatomy, block: int, edit: PassEdit
) -> Callable[[], None]:
    """Edit the keys of one block beside others that do so, until the function given back is called.

    They apply in the order of the calls and may end in any order. None keeps the module alive.
    """
    attention = module.get_submodule(anatomy.language.attention[block])
    if attention not in SHARED:
        edits: list[PassEdit] = []

        def all_edits(key: Tensor, given: Mapping[str, Any]) -> Tensor:
            for one in edits:
                key = one(key, given)
            return key

        SHARED[attention] = (edits, _redirect(module, anatomy, block, all_edits))
    mine, end_all = SHARED[attention]
    mine.append(edit)
    seen = ref(attention)

    def end() -> None:
        mine.remove(edit)
        if not mine and (module := seen()) is not None:
            SHARED.pop(module)
            end_all()

    return end


def _redirect(model: nn.Module, anatomy: Anatomy, block: int, edit: PassEdit) -> Callable[[], None]:
    """Lead a block's attention to the edited function; the result gives its old config back."""
    anatomy.language.call(block)
    attention: Any = model.get_submodule(anatomy.language.attention[block])
    names = inspect.unwrap(type(attention).forward).__globals__
    registry, eager = names.get("ALL_ATTENTION_FUNCTIONS"), names.get("eager_attention_forward")
    if registry is None:
        raise AttentionCallError(
            f"{type(attention).__module__} has no ALL_ATTENTION_FUNCTIONS; expected an attention "
            "module of transformers 5. Please report this class."
        )
    width = getattr(attention, "head_dim", anatomy.language.d_head)
    width = getattr(attention, "qk_head_dim", width)  # of latent attention
    before, ours = attention.config, copy.copy(attention.config)
    name = f"sinkscope_keys_{next(NUMBERS)}"
    ours._attn_implementation = {"": name}  # as a dict: the configs below are shared, and stay

    # The registry outlives the module, so nothing here may hold the module.
    def attend(module: Any, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Any:
        function = registry.get_interface(before._attn_implementation, eager)
        edited = edit(key[..., :width], named)
        if key.shape[-1] > width:
            edited = torch.cat([edited, key[..., width:]], dim=-1)
        now, module.config = module.config, before  # what kernels read there is the model's own
        try:
            return function(module, query, edited, *rest, **named)
        finally:
            module.config = now

    registry[name] = attend
    attention.config = ours
    forget = finalize(attention, registry.pop, name, None)
    forget.atexit = False
    seen = ref(attention)

    def end() -> None:
        if (module := seen()) is not None:
            module.config = before
        forget()

    return end
