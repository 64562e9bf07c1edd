"""Plain passes of the decoder, without nnsight: its arguments, and edits of its keys.

To edit keys the attention module gets a shallow copy of its config, with a name of our own for the
function it looks up: that edits the keys after RoPE and k-norm, and calls the model's own kernel. The
cache keeps clean keys, and head dimensions that a trace adds for a bias of the logits stay as they are.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn

from sinkscope.anatomy.attention_call import globals_of, registry_of
from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import check_whole
from sinkscope.errors import AttentionCallError, LayerError, ModelError
from sinkscope.models.wrapping import Inputs, lent, on_device, undisturbed

Given = dict[str, Any]
"""Keyword arguments of the decoder."""
DROPPED = ("past_key_values", "use_cache", "cache_position", "return_dict")
KeyEdit = Callable[[Tensor], Tensor]
PassEdit = Callable[[Tensor, Given], Tensor]
"""Keys, and what else the attention function was called with by name, to keys."""
SHARED: WeakKeyDictionary[nn.Module, tuple[list[PassEdit], Any]] = WeakKeyDictionary()
"""By attention module: the edits of `share_keys`, and what ends them all."""


class Ended(Exception):  # noqa: N818  it ends a pass; nothing went wrong
    """Leaves a forward pass where nothing more of it is wanted."""


def decoder_inputs(lvlm: Any, inputs: Inputs, features: Any = None) -> tuple[Given, Any]:
    """The decoder's keyword arguments for a batch, and the image features, None if there are none.

    ``features`` of the same images in the same order spare the vision tower. ModelError if the decoder
    is called with something that cannot be cut into rows.
    """
    module, base = lvlm.module, lvlm.module.base_model
    calls: list[tuple[tuple, Given]] = []
    seen: list[Any] = []

    def stop(decoder: Any, args: tuple, given: Given) -> None:
        calls.append((args, given))
        raise Ended

    def answer(*args: Any, **options: Any) -> Any:  # the model's own call for image features
        seen.append(compute(*args, **options) if features is None else features)
        return seen[-1]

    compute: Any = getattr(base, "get_image_features", None)
    loans = [] if compute is None else [(base, {"get_image_features": answer})]
    hook = module.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    with hook, suppress(Ended), undisturbed(module), lent(loans):
        base(**on_device(inputs, lvlm.device), use_cache=False)
    if not calls or calls[0][0]:
        got = f"{type(module).__name__} called its decoder {len(calls)} times, or with positional"
        write = "expected one call per pass, with keywords only. Please report this class."
        raise ModelError(f"{got} arguments; {write}")
    return checked(calls[0][1]), seen[-1] if seen else features


def checked(given: Inputs) -> Given:
    """The arguments without those of the cache; all others can be cut into rows."""
    out = {k: v for k, v in given.items() if k not in DROPPED and v is not None}
    known = ("inputs_embeds", "attention_mask", "position_ids")
    plain = (type(None), bool, int, float, str)
    strange = [k for k, v in out.items() if k not in known and not isinstance(v, plain)]
    if strange or not isinstance(out.get("inputs_embeds"), Tensor):
        got = f"The decoder is called with {sorted(out)}; expected {known} and plain options"
        raise ModelError(f"{got}; cannot cut {strange} into rows. Please report this class.")
    return out


@contextmanager
def scaled_keys(
    module: nn.Module, anatomy: Anatomy, edits: Mapping[int, KeyEdit]
) -> Iterator[None]:
    """Edit the keys of decoder blocks until the block ends; of nested contexts the inner edits first.

    ``edits`` are functions, by block index, of the keys ``[row kv_head key d_head]`` (the whole cache) to
    keys of the same shape, which must not write into their argument. LayerError if there is no such block;
    AttentionCallError if one has no attention registry.
    """
    hint = "Write {10: lambda key: 0.5 * key} to halve the logits of block 10."
    with ExitStack() as stack:
        for block, edit in edits.items():
            check_whole(0, anatomy.language.n_layers - 1, error=LayerError, hint=hint, block=block)
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

        def all_edits(key: Tensor, given: Given) -> Tensor:
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
    registry, names = registry_of(attention), globals_of(attention)
    eager = names.get("eager_attention_forward")
    if registry is None:
        got = f"{type(attention).__module__} has no ALL_ATTENTION_FUNCTIONS; expected an attention"
        raise AttentionCallError(f"{got} module of transformers 5. Please report this class.")
    width = getattr(attention, "head_dim", anatomy.language.d_head)
    width = getattr(attention, "qk_head_dim", width)  # of latent attention
    before, ours = attention.config, copy.copy(attention.config)
    name = f"sinkscope_keys_{uuid4().hex}"
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
