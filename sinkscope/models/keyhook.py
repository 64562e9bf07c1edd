"""Scale the keys of chosen blocks in a plain forward pass, without nnsight.

::

    q, k, v = projections, norms, RoPE          the module's own forward
    cache.update(k, v)                          the cache keeps clean keys
    attention = REGISTRY[module.config...]      <- this look-up finds our function
    attention(module, q, edit(k), v, mask)      the base function, with edited keys

An attention module looks its function up by a name in its config. The module gets a shallow copy of
the config with a name of our own, under which the registry holds a function that edits the keys and
then asks the function that was there before. So keys are edited after RoPE and after any k-norm, at
every pass, under the model's own kernel. The model's config object is not touched, so it makes its
masks as before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from torch import Tensor, nn

from sinkscope.errors import AttentionCallError, LayerError
from sinkscope.models.anatomy import Anatomy

KeyEdit = Callable[[Tensor], Tensor]
NUMBERS = count()


@contextmanager
def scaled_keys(
    module: nn.Module, anatomy: Anatomy, edits: Mapping[int, KeyEdit]
) -> Iterator[None]:
    """Edit the keys of decoder blocks until the block ends, also if it ends in an error.

    Contexts may be nested: the inner edit comes first, then the outer one.

    Args:
        module: The whole model.
        anatomy: Its anatomy.
        edits: Block index -> function of the keys ``[row kv_head key d_head]`` (the whole cache)
            to keys of the same shape; it must not write into its argument.

    Raises:
        LayerError: If there is no such block.
        AttentionCallError: If a block does not call attention through transformers' registry.
    """
    tower = anatomy.language
    for block in edits:
        if (
            isinstance(block, bool)
            or not isinstance(block, int)
            or block not in range(tower.n_layers)
        ):
            raise LayerError(
                f"Got block {block!r}; expected an index from 0 to {tower.n_layers - 1}. Write "
                "{10: lambda key: 0.5 * key} to halve the logits of block 10."
            )
        tower.call(block)
    with ExitStack() as stack:
        for block, edit in edits.items():
            attention = module.get_submodule(tower.attention[block])
            stack.enter_context(_edited(attention, edit))
        yield


@contextmanager
def _edited(attention: Any, edit: KeyEdit) -> Iterator[None]:
    """Give one attention module a config of its own that leads to the edited function."""
    names = inspect.unwrap(type(attention).forward).__globals__
    registry, eager = names.get("ALL_ATTENTION_FUNCTIONS"), names.get("eager_attention_forward")
    if registry is None:
        raise AttentionCallError(
            f"{type(attention).__module__} has no ALL_ATTENTION_FUNCTIONS; expected an attention "
            "module of transformers 5. Please report this class."
        )
    before = attention.config
    ours = copy.copy(before)
    name = f"sinkscope_keys_{next(NUMBERS)}"
    ours._attn_implementation = {"": name}  # as a dict: the configs below are shared, and stay

    def attend(module: Any, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Any:
        function = registry.get_interface(before._attn_implementation, eager)
        now, module.config = module.config, before  # what kernels read there is the model's own
        try:
            return function(module, query, edit(key), *rest, **named)
        finally:
            module.config = now

    registry[name] = attend
    attention.config = ours
    try:
        yield
    finally:
        attention.config = before
        del registry[name]
