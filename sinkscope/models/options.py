"""Check what the user asks of a run before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import InputError, ProbeError
from sinkscope.models.prepare import Sample
from sinkscope.probes.protocol import Probe

# A decode step has one query per row and the keys of its own row. What breaks that is refused.
ONE_QUERY_PER_ROW = MappingProxyType(
    {
        "num_beams": (None, 1),
        "num_return_sequences": (None, 1),
        "use_cache": (None, True),
        "return_dict_in_generate": (None, False),
        "assistant_model": (None,),
        "prompt_lookup_num_tokens": (None,),
        "penalty_alpha": (None,),
        "prefill_chunk_size": (None,),
    }
)
GUIDANCE_OFF = (None, 1, 1.0)
FIXED = ("static", "sliding_window", "hybrid", "hybrid_chunked")
"""Caches of fixed length, with room for keys that no token has made yet."""


def check_sample(sample: Any, fingerprint: tuple[Any, ...]) -> None:
    """Refuse what is no sample, or one of another model.

    Raises:
        InputError: If so.
    """
    if not isinstance(sample, Sample):
        raise InputError(
            f"Got {type(sample).__name__} as sample; expected what lvlm.prepare(...) returns. Write "
            "lvlm.run(lvlm.prepare(images=image, text='...'))."
        )
    if sample.made_for is not None and sample.made_for != fingerprint:
        raise InputError(
            f"Got a sample of a {sample.made_for[0]!r} model of another layout; expected one made by "
            "this LVLM. Write lvlm.prepare(...) with the same images and text."
        )


def check_probes(probes: Any) -> list[Probe]:
    """The probes as a list.

    Raises:
        ProbeError: If there is something else among them.
    """
    if isinstance(probes, Probe):
        raise ProbeError(
            f"Got one {type(probes).__name__}; expected a list of probes. Write probes=[probe]."
        )
    if not isinstance(probes, Iterable) or isinstance(probes, (str, Mapping)):
        raise ProbeError(
            f"Got probes={probes!r}; expected a list of probes, such as "
            "[ss.AttentionMass({'image': 'image'})]."
        )
    out = list(probes)
    for probe in out:
        if isinstance(probe, type):
            raise ProbeError(
                f"Got the class {probe.__name__} among the probes; expected an object of it. Write "
                f"{probe.__name__}(...)."
            )
        if not isinstance(probe, Probe):
            raise ProbeError(
                f"Got {probe!r} among the probes; expected objects with reads() and finish(), "
                "such as ss.AttentionMass({'image': 'image'})."
            )
    return out


def check_logits(logits: Any, default: str) -> bool:
    """Whether the logits of all positions are wanted.

    Raises:
        ProbeError: If ``logits`` is neither ``"all"`` nor ``"last"`` nor None.
    """
    if logits not in (None, "all", "last"):
        raise ProbeError(
            f"Got logits={logits!r}; expected 'all' or 'last', or None for 'all' here and 'last' on "
            "remote runs."
        )
    return (logits or default) == "all"


def check_remote(remote: Any) -> bool | str:
    """Where to run.

    Raises:
        InputError: If ``remote`` is neither a bool, ``"local"`` nor the address of a server.
    """
    known = isinstance(remote, bool) or remote == "local"
    if known or (isinstance(remote, str) and remote.startswith(("http://", "https://"))):
        return remote
    raise InputError(
        f"Got remote={remote!r}; expected True for NDIF, 'local' for the same path without a server, "
        "False, or the address of a server, 'https://...'."
    )


def check_grad(grad: bool, where: bool | str) -> bool | str:
    """Where to run, which is here if gradients are wanted.

    Raises:
        InputError: If it is elsewhere.
    """
    if grad and where:
        raise InputError(
            f"Got grad=True with remote={where!r}; expected a run here, where the graph can be kept. "
            "Write remote=False."
        )
    return where


def check_weights(where: bool | str, *, weightless: bool, offloaded: bool) -> None:
    """Refuse to run here what has no weights here, and as on a server what is offloaded.

    Raises:
        InputError: If so.
    """
    if offloaded and where == "local" and not weightless:
        raise InputError(
            "Got remote='local' for a model whose weights are offloaded; expected them in memory, as "
            "they are on a server. Write remote=False, or load the model without offloading."
        )
    if weightless and where in (False, "local"):
        raise InputError(
            f"Got remote={where!r} for a model without weights; expected remote=True. Write "
            "ss.LVLM.from_pretrained(name) to load the weights here."
        )


def check_generation(
    sample: Sample, max_new_tokens: Any, options: Mapping[str, Any], defaults: Any
) -> None:
    """Refuse ways of generating whose steps cannot be probed one query at a time.

    Args:
        sample: The sample.
        max_new_tokens: Upper bound on the answer's length.
        options: The user's options of ``generate``.
        defaults: The model's generation config, or None.

    Raises:
        InputError: If so.
    """
    whole = isinstance(max_new_tokens, Integral) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 1:
        raise InputError(f"Got max_new_tokens={max_new_tokens!r}; expected an int of at least 1.")
    given = options.get("generation_config", defaults)
    for name, allowed in ONE_QUERY_PER_ROW.items():
        value = options.get(name, getattr(given, name, None))
        if value not in allowed:
            raise InputError(
                f"Got {name}={value!r}; expected {allowed[-1]!r}. Every decode step is probed with "
                f"one query per row: write lvlm.generate(..., {name}={allowed[-1]!r})."
            )
    guidance = options.get("guidance_scale", getattr(given, "guidance_scale", None))
    if guidance not in GUIDANCE_OFF:
        raise InputError(
            f"Got guidance_scale={guidance!r}; expected 1 or None. It runs the model twice per step, "
            "and the two passes cannot be told apart. Write lvlm.generate(..., guidance_scale=None)."
        )
    of_run = sorted(set(options) & {"kl", "logits", "grad"})
    if of_run:
        raise InputError(
            f"Got {of_run} as options of generate; expected them in lvlm.run(...) only. For the first "
            f"token of the answer write lvlm.run(sample, probes, interventions, {of_run[0]}=...)."
        )
    twice = sorted(set(options) & (set(sample.inputs) | {"inputs"}))
    if twice:
        raise InputError(
            f"Got {twice} as options of generate; expected them in the sample only. Write "
            "lvlm.prepare(inputs=...) and pass that sample."
        )
    if not bool(sample.tokens.live[:, -1].all()):
        raise InputError(
            "Got a right-padded batch to generate from; expected padding on the left. Write "
            "processor.tokenizer.padding_side = 'left' before you make the inputs."
        )


def growing_cache(options: Mapping[str, Any], defaults: Any) -> dict[str, str]:
    """The option that replaces a cache of fixed length by one that grows; it changes no number.

    Args:
        options: The user's options of ``generate``.
        defaults: The model's generation config, or None.
    """
    given = options.get("generation_config", defaults)
    kind = options.get("cache_implementation", getattr(given, "cache_implementation", None))
    fixed = str(kind).removeprefix("offloaded_") in FIXED
    return {"cache_implementation": "dynamic"} if fixed else {}


def ended_rows(
    sequences: Tensor, prompt: int, step: int, options: Mapping[str, Any], defaults: Any
) -> Tensor:
    """Rows whose answer ended before this step, bool ``[batch]``.

    Args:
        sequences: Int ``[batch pos]``.
        prompt: Length of the prompt.
        step: The step; it reads the tokens generated before it.
        options: The user's options of ``generate``.
        defaults: The model's generation config, or None.
    """
    given = options.get("generation_config", defaults)
    ends = options.get("eos_token_id", getattr(given, "eos_token_id", None))
    if ends is None:
        return torch.zeros(sequences.shape[0], dtype=torch.bool)
    ends = torch.as_tensor(ends).flatten()
    return torch.isin(sequences[:, prompt : prompt + step].cpu(), ends.cpu()).any(dim=1)
