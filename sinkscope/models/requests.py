"""What is asked of a run: checked before anything runs, and made a plan of reads and edits by site."""

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import among, check_flags, check_whole, plain
from sinkscope.errors import InputError, ProbeError, nearest
from sinkscope.interventions.application import check_beside, check_interventions, check_reach
from sinkscope.kernels.edited_call import STAGES
from sinkscope.models.inputs import Sample, layout_of
from sinkscope.protocols import Edit, Intervention, Probe, as_list
from sinkscope.sites import Site, in_order

# A decode step has one query per row and the keys of its own row. What breaks that is refused.
ONE_QUERY_PER_ROW: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    dict.fromkeys(("num_beams", "num_return_sequences", "guidance_scale"), (None, 1))
    | {"use_cache": (None, True)}
    | dict.fromkeys(("return_dict_in_generate", "use_mtp", "synced_gpus"), (None, False))
    | dict.fromkeys(("is_assistant", "token_healing"), (None, False))
    | dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit"), (None,))
    | dict.fromkeys(("penalty_alpha", "dola_layers", "constraints"), (None,))
    | dict.fromkeys(("force_words_ids", "prefill_chunk_size"), (None,))
)
NEVER_NONE = ("num_beams", "num_return_sequences", "use_cache")  # given so, None is no default
CHECKED = ("early_stopping", "compile_config", "cache_implementation", "watermarking_config")
CHECKED += ("assistant_ensemble_weight",)  # which a GenerationConfig checks when it is made
GREEDY: Mapping[str, Any] = MappingProxyType(
    {name: allowed[-1] for name, allowed in ONE_QUERY_PER_ROW.items()}
    | {"do_sample": False}
    | dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1.0)
    | dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0)
    | dict.fromkeys(("min_new_tokens", "forced_eos_token_id", "suppress_tokens"))
    | dict.fromkeys(("begin_suppress_tokens", "bad_words_ids", "sequence_bias"))
    | dict.fromkeys(("watermarking_config", "exponential_decay_length_penalty"))
    | dict.fromkeys(("stop_strings", "max_time"))
)
"""Options of ``generate`` under which every token has the highest logit, whatever the model's config."""
SETTINGS = {*vars(GenerationConfig()), "generation_config", "logits_processor", "streamer"}
SETTINGS |= {"prefix_allowed_tokens_fn", "stopping_criteria", "synced_gpus", "tokenizer"}
"""What ``generate`` takes and no pass reads: the fields of a GenerationConfig, and what is beside."""
Plan = list[dict[str, Any]]


def plan_of(
    probes: Sequence[Probe],
    interventions: Sequence[Intervention],
    context: Context,
    model: Any,
    effects: bool = True,
) -> Plan:
    """Group reads and edits, each with its slot, by site in forward order, edits by stage, looks last.

    The probes and interventions must be made for the ``model``, an `LVLM`; without ``effects`` the attention
    on edited keys is not measured.
    """
    reads = [(slot, read) for slot, probe in enumerate(probes) for read in probe.reads(context)]
    edits: list[tuple[int, Edit]] = []
    for slot, it in enumerate(interventions):
        getattr(it, "check_fits", lambda _: None)(model)
        mine = it.edits(context)
        check_reach(it, mine, context.anatomy.reaching)
        edits += [(slot, edit) for edit in mine]
    steps: dict[Site, dict[str, Any]] = {}
    edits.sort(key=lambda edit: (STAGES.index(edit[1].stage), edit[1].look))
    for slot, one in (*reads, *edits):
        step = steps.setdefault(one.site, {"reads": [], "edits": [], "stages": []})
        question = (slot, one.kernel, dict(one.parameters))
        step["edits" if isinstance(one, Edit) else "reads"].append(question)
        step["stages"] += [one.stage] if isinstance(one, Edit) else []
    plan = [step_at(context.anatomy, site, **steps[site]) for site in in_order(steps)]
    moved = {getattr(it, "changes_positions_of", None) for it in interventions}
    here = {step["tower"] for step in plan} - {"projector", *moved}
    shapes = {
        tower: tuple(context.live(tower).shape) for tower in here if context.layout(tower) is None
    }
    for step in plan:
        if (tower := step["tower"]) in shapes:  # of decode steps the keys may be any
            step |= {"tokens": shapes[tower], "keys": not context.step}
        step |= {"moved": tower in moved, "measure": effects}
    return plan


def step_at(
    anatomy: Anatomy, site: Site, reads: Sequence = (), edits: Sequence = (), stages: Sequence = ()
) -> dict[str, Any]:
    """One step of the plan: where a site lies in this model, and what is asked there."""
    step = {**vars(site), "reads": reads, "edits": edits, "stages": stages}
    if site.tower == "projector":
        return step | {"path": anatomy.projector, "how": site.name}
    tower, layer = anatomy.tower(site.tower), site.layer
    if site.name == "attention":
        call = tower.call(layer)
        return step | vars(call) | {"path": tower.attention[layer], "how": "attention"}
    tower.states(site.name, layer)
    step |= {"spatial": True} if tower.proof(layer).spatial else {}
    if site.name in ("attn_out", "mlp_out"):
        branch = tower.branch(site.name, layer)
        return step | {"path": branch.path, "how": "output", "factors": branch.factors}
    path = (tower.neurons if site.name == "mlp_hidden" else tower.blocks)[layer]
    return step | {"path": path, "how": "output" if site.name == "resid_post" else "input"}


def check_run(
    sample: Any, anatomy: Anatomy, probes: Any = (), interventions: Any = ()
) -> tuple[list[Probe], list[Intervention]]:
    """The probes and interventions of a run, as lists; refuse a sample of another model."""
    if not isinstance(sample, Sample):
        got = f"Got {type(sample).__name__} as sample; expected what lvlm.prepare(...) returns"
        raise InputError(f"{got}. Write lvlm.run(lvlm.prepare(images=image, text='...')).")
    if sample.made_for not in (None, layout_of(anatomy)):
        got = f"Got a sample of a {sample.made_for[0]!r} model of another layout; expected one made"
        raise InputError(f"{got} by this LVLM. Write lvlm.prepare(...) with the same images, text.")
    such = "reads() and finish(), such as ss.AttentionMass({'image': 'image'})"
    asked = as_list(probes, Probe, ProbeError, "probes", such)
    edits = check_interventions(interventions)
    check_beside(edits, asked)
    return asked, edits


def mark_of(*asked: Any) -> str:
    """32 hexadecimal digits that differ where another question is asked: inputs, sites, kernels, parameters."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        value = list(value.items()) if isinstance(value, Mapping) else value
        if isinstance(value, (list, tuple)):
            digest.update(f"{len(value)}(".encode())
            for one in value:
                add(one)
        elif isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + flat.numpy().tobytes())
        elif value is None or isinstance(value, (bool, int, float, str)):
            digest.update(f"{value!r},".encode())
        else:
            kind = value if hasattr(value, "__qualname__") else type(value)
            digest.update(f"{kind.__module__}.{kind.__qualname__},".encode())
            if kind is type(value) and kind.__module__.startswith("sinkscope."):
                add(vars(value))  # what it holds tells two of a kind apart

    add(asked)
    return digest.hexdigest()


def setting(name: str, options: Mapping[str, Any], defaults: Any) -> Any:
    """What ``generate`` takes a setting to be: of the options, their config, or the model's."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(defaults, name, None) if given is None else given


def check_generation(sample: Sample, options: Mapping[str, Any], defaults: Any) -> dict[str, str]:
    """Refuse ways of generating whose steps cannot be probed one query at a time; see `setting`.

    Returns the option that replaces a cache of fixed length by one that grows, which changes no number.
    """
    if strange := sorted(set(options) - SETTINGS):
        hint = nearest(strange[0], SETTINGS)
        got = f"Got {strange} as options of generate; expected settings of decoding: eos_token_id=2"
        hint = f" {hint}" if hint.startswith("Did") else ""
        where = "Inputs stand in the sample, without a cache; kl, logits and grad are for lvlm.run"
        raise InputError(f"{got}.{hint} {where}(...).")
    if (many := options.get("max_new_tokens")) is not None:
        check_whole(1, max_new_tokens=many)
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        got = f"Got a generation_config of type {type(config).__name__}; expected a transformers."
        raise InputError(f"{got}GenerationConfig. Write its fields as options: do_sample=True.")
    _check_values(options)
    for name, allowed in ONE_QUERY_PER_ROW.items():
        value, write = setting(name, options, defaults), f"{name}={allowed[-1]!r}"
        if not among(value, allowed) or (name in NEVER_NONE and options.get(name, "") is None):
            got = f"Got {name}={value!r}; expected {allowed[-1]!r}. Every decode step is probed"
            raise InputError(f"{got} with one query per row: write lvlm.generate(..., {write}).")
    cache = setting("cache_implementation", options, defaults)
    if cache == "paged" or (cache == "offloaded" and not torch.accelerator.is_available()):
        wanted = "the keys of each row" if cache == "paged" else "keys in memory: no GPU is here"
        got = f"Got cache_implementation={cache!r}; expected a cache with {wanted}."
        raise InputError(f"{got} Write cache_implementation=None.")
    stops = setting("stop_strings", options, defaults) or options.get("stopping_criteria")
    if len(sample) > 1 and stops:
        got = f"Got {stops!r} to stop {len(sample)} rows at; expected one row, or eos_token_id=..."
        raise InputError(f"{got}: no token says which row has ended. Prepare them one by one.")
    if not bool(sample.tokens.live[:, -1].all()):
        got = "Got a right-padded batch to generate from; expected padding on the left."
        write = "processor.tokenizer.padding_side = 'left'"
        raise InputError(f"{got} Write {write} before making inputs.")
    fixed = ("static", "sliding_window", "hybrid", "hybrid_chunked")
    grows = str(cache).removeprefix("offloaded_") not in fixed
    return {} if grows else {"cache_implementation": "dynamic"}


def _check_values(options: Mapping[str, Any]) -> None:
    """Refuse values that ``generate`` stumbles over, or takes for others: ``eos_token_id=1.5`` for 1."""
    flags = ("do_sample", "renormalize_logits", "remove_invalid_values", "disable_compile")
    check_flags(**{name: options[name] for name in flags if options.get(name) is not None})
    for name in ("eos_token_id", "pad_token_id"):
        ids = options.get(name)
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        for one in ids if isinstance(ids, (list, tuple)) else [ids] if ids is not None else ():
            check_whole(0, **{name: plain(one)})
    lists = ("logits_processor", "stopping_criteria")
    for name in (*lists, "prefix_allowed_tokens_fn", "streamer"):
        value = options.get(name)
        one = getattr(value, "put", None) if name == "streamer" else value
        called = value if name in lists else [one]
        if value is not None and not (isinstance(called, list) and all(map(callable, called))):
            got = f"Got {name}={value!r}; expected what the generate of transformers takes there"
            raise InputError(f"{got}. Write {name}=None.")
    given = {name: options[name] for name in CHECKED if name in options}
    try:
        GenerationConfig(**given)
    except (ValueError, TypeError, AttributeError) as error:
        got = f"Got {given}, which transformers refuses ({error})"
        raise InputError(f"{got}; expected settings of a GenerationConfig.") from error


def ended_rows(sequences: Tensor, prompt: int, step: int, ends: Any) -> Tensor:
    """Rows of ``[batch pos]`` with one of the tokens ``ends`` before a step, bool ``[batch]``."""
    ends = torch.as_tensor([] if ends is None else ends, dtype=torch.long).flatten()
    return torch.isin(sequences[:, prompt : prompt + step].cpu(), ends.cpu()).any(dim=1)
