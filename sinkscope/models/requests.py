"""Check what the user asks of a run before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkscope.checks import check_choice, is_whole
from sinkscope.errors import InputError, ProbeError, nearest
from sinkscope.interventions.application import check_beside, check_interventions
from sinkscope.models.inputs import Sample
from sinkscope.protocols import Intervention, Probe

# A decode step has one query per row and the keys of its own row. What breaks that is refused.
ONE_QUERY_PER_ROW: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "num_beams": (None, 1),
        "num_return_sequences": (None, 1),
        "use_cache": (None, True),
        "guidance_scale": (None, 1),
        **dict.fromkeys(
            ("return_dict_in_generate", "use_mtp", "is_assistant", "token_healing"), (None, False)
        ),
        **dict.fromkeys(
            (
                "prompt_lookup_num_tokens",
                "assistant_early_exit",
                "penalty_alpha",
                "dola_layers",
                "constraints",
                "force_words_ids",
                "prefill_chunk_size",
            ),
            (None,),
        ),
    }
)
GREEDY: Mapping[str, Any] = MappingProxyType(
    {
        **{name: allowed[-1] for name, allowed in ONE_QUERY_PER_ROW.items()},
        "do_sample": False,
        **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1.0),
        **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
        **dict.fromkeys(
            (
                "min_new_tokens",
                "forced_eos_token_id",
                "suppress_tokens",
                "begin_suppress_tokens",
                "bad_words_ids",
                "sequence_bias",
                "watermarking_config",
                "exponential_decay_length_penalty",
                "stop_strings",
                "max_time",
            )
        ),
    }
)
"""Options of ``generate`` under which every token has the highest logit, whatever the model's config."""
BESIDE_SETTINGS = (
    "generation_config",
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "tokenizer",
)
"""What ``generate`` takes beside the fields of a GenerationConfig, and no pass reads."""
FIXED = ("static", "sliding_window", "hybrid", "hybrid_chunked")
"""Caches of fixed length, with room for keys that no token has made yet."""


def check_run(
    sample: Any, layout: tuple[Any, ...], probes: Any = (), interventions: Any = ()
) -> tuple[list[Probe], list[Intervention]]:
    """The probes and interventions of a run as lists, all of the right kind; see `check_sample`."""
    check_sample(sample, layout)
    asked, edits = check_probes(probes), check_interventions(interventions)
    check_beside(edits, asked)
    return asked, edits


def check_sample(sample: Any, layout: tuple[Any, ...]) -> None:
    """Refuse what is no sample, or one of a model of another layout (`identity.layout_of`).

    Raises:
        InputError: If so.
    """
    if not isinstance(sample, Sample):
        raise InputError(
            f"Got {type(sample).__name__} as sample; expected what lvlm.prepare(...) returns. Write "
            "lvlm.run(lvlm.prepare(images=image, text='...'))."
        )
    if sample.made_for is not None and sample.made_for != layout:
        raise InputError(
            f"Got a sample of a {sample.made_for[0]!r} model of another layout; expected one made by "
            "this LVLM. Write lvlm.prepare(...) with the same images and text."
        )


def check_probes(probes: Any) -> list[Probe]:
    """The probes as a list.

    Raises:
        ProbeError: If there is something else among them.
    """
    if isinstance(probes, (Probe, str, Mapping)) or not isinstance(probes, Iterable):
        got = f"one {type(probes).__name__}" if isinstance(probes, Probe) else f"probes={probes!r}"
        raise ProbeError(f"Got {got}; expected a list of probes. Write probes=[probe].")
    out = list(probes)
    for probe in out:
        if isinstance(probe, type):
            raise ProbeError(
                f"Got the class {probe.__name__} among the probes; expected an object of it. Write "
                f"{probe.__name__}(...)."
            )
        if not isinstance(probe, Probe):
            raise ProbeError(
                f"Got {probe!r} among the probes; expected objects with reads() and finish(), such as "
                "ss.AttentionMass({'image': 'image'})."
            )
    return out


def check_logits(logits: Any, default: str) -> bool:
    """Whether the logits of all positions are wanted.

    Raises:
        ProbeError: If ``logits`` is neither ``"all"`` nor ``"last"`` nor None.
    """
    hint = "None is 'all' here and 'last' on remote runs."
    check_choice(("all", "last", None), error=ProbeError, hint=hint, logits=logits)
    return (logits or default) == "all"


def setting(name: str, options: Mapping[str, Any], defaults: Any) -> Any:
    """What ``generate`` will take a setting to be: an option, a config among them, or the model's.

    ``defaults`` is the model's generation config, or None.
    """
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(defaults, name, None) if given is None else given


def check_generation(sample: Sample, options: Mapping[str, Any], defaults: Any) -> None:
    """Refuse ways of generating whose steps cannot be probed one query at a time; see `setting`.

    Raises:
        InputError: If so.
    """
    check_settings(options)
    for name, allowed in ONE_QUERY_PER_ROW.items():
        value = setting(name, options, defaults)
        if value not in allowed:
            raise InputError(
                f"Got {name}={value!r}; expected {allowed[-1]!r}. Every decode step is probed with "
                f"one query per row: write lvlm.generate(..., {name}={allowed[-1]!r})."
            )
    if setting("cache_implementation", options, defaults) == "paged":
        raise InputError(
            "Got cache_implementation='paged'; expected a cache with the keys of each row. Write "
            "cache_implementation=None."
        )
    stops = setting("stop_strings", options, defaults) or options.get("stopping_criteria")
    if len(sample) > 1 and stops:
        raise InputError(
            f"Got {stops!r} to stop {len(sample)} rows at; expected one row, or eos_token_id=...: else "
            "a row that has ended cannot be told from one that goes on. Prepare the rows one by one."
        )
    if not bool(sample.tokens.live[:, -1].all()):
        raise InputError(
            "Got a right-padded batch to generate from; expected padding on the left. Write "
            "processor.tokenizer.padding_side = 'left' before you make the inputs."
        )


def check_settings(options: Mapping[str, Any]) -> None:
    """Refuse options that are no settings of decoding: they would change what a pass reads.

    Raises:
        InputError: If there are any, or a setting is of the wrong type.
    """
    from transformers import GenerationConfig

    known = {*vars(GenerationConfig()), *BESIDE_SETTINGS}
    strange = sorted(set(options) - known)
    if strange:
        hint = nearest(strange[0], known)
        raise InputError(
            f"Got {strange} as options of generate; expected settings of decoding, such as "
            f"eos_token_id=2. {hint if hint.startswith('Did') else ''} What a pass reads stands in the "
            "sample: lvlm.prepare(...). Every answer begins without a cache, and kl, logits and grad "
            "are for lvlm.run(...)."
        )
    many = options.get("max_new_tokens")
    if many is not None and not is_whole(many, 1):
        raise InputError(f"Got max_new_tokens={many!r}; expected an int of at least 1.")
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise InputError(
            f"Got a generation_config of type {type(config).__name__}; expected a "
            "transformers.GenerationConfig. Write its fields as options: do_sample=True."
        )


def growing_cache(options: Mapping[str, Any], defaults: Any) -> dict[str, str]:
    """The option that replaces a cache of fixed length by one that grows; it changes no number."""
    kind = setting("cache_implementation", options, defaults)
    fixed = str(kind).removeprefix("offloaded_") in FIXED
    return {"cache_implementation": "dynamic"} if fixed else {}


def ended_rows(sequences: Tensor, prompt: int, step: int, ends: Any) -> Tensor:
    """Rows of ``[batch pos]`` whose answer behind the prompt ended before a step, bool ``[batch]``.

    ``ends`` is the token or the tokens that end an answer, or None.
    """
    if ends is None:
        return torch.zeros(sequences.shape[0], dtype=torch.bool)
    ends = torch.as_tensor(ends).flatten()
    return torch.isin(sequences[:, prompt : prompt + step].cpu(), ends.cpu()).any(dim=1)
