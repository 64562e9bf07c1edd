"""What the words of a command mean: models, detectors, and recipes of the three long commands in YAML.

::

    model: {name: llava-hf/llava-1.5-7b-hf, dtype: float16, device_map: cuda}
    v_detector: norm:100
    sweep:
      data: {source: Lin-Chen/MMStar, split: val, columns: {task: category}}
      out: runs/mmstar
    train:
      data: {source: questions.jsonl}
      layers: [10]

What stands at the top holds for all three; what stands in a section wins there, and a flag wins over
both. Every other key of a section is an argument of the function behind the command, by its name.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sinkscope.checks import check_choice, check_flags
from sinkscope.errors import CheckpointError, DetectorError, InputError, nearest

if TYPE_CHECKING:
    from sinkscope.data.questions import Questions
    from sinkscope.detectors import Detector
    from sinkscope.models import LVLM

COMMANDS = {"sweep": "sweep", "train": "train-lsg", "compare": "compare"}  # by section of a recipe
MODEL_KEYS = ("name", "dtype", "device_map", "revision", "attn_implementation")
MODEL_KEYS += ("quantization_config", "trust_remote_code")
NOT_WORDS = {"accelerator", "calibration", "dry_run", "gates", "progress", "samples", "settings"}
NOT_WORDS |= {"validation_data"}  # arguments that a recipe cannot give
# Key -> what its value is if it is one word.
SHORT = {"model": "name", "data": "source", "calibrate": "source"}
EXAMPLES = {"v_detector": "norm:100", "l_detector": "dims:1415,2533:20", "out": "runs/map"}
SHARED = (*SHORT, *EXAMPLES, "conditions")  # keys with a meaning of their own; others are arguments
WORDS = ("bundled", "example")  # the models of the package
FORMS = {  # first word -> how such a detector is written
    "norm": "norm:100, norm:valley, norm:3sigma",
    "valley": "valley",
    "3sigma": "3sigma",
    "dims": "dims:1415,2533:20 (divided by the RMS), dims:1415,2533:8:none (raw)",
    "massive": "massive, massive:100:1000 (absolute, times the median)",
    "received": "received:0.3, received:5x (times the null)",
    "cosine": "cosine:0.9 (to the first token)",
    "cls": "cls (the ViT's CLS token, where the projector keeps it)",
    "register": "register (the ViT's register tokens likewise)",
}
HELP = "A detector is one of: " + "; ".join(FORMS.values()) + "."


@dataclass(frozen=True)
class Recipe:
    """One command's settings."""

    model: Mapping[str, Any]  # arguments of `load_model`
    data: Questions
    calibrate: Questions | None = None  # whose images the detectors are found on
    v_detector: str | None = None  # in a few words
    l_detector: str | None = None
    out: str | None = None
    conditions: Any = field(default_factory=dict)  # for ``compare``: name -> see `condition`
    options: Mapping[str, Any] = field(default_factory=dict)  # of the function behind the command

    def load(self, *, weights: bool = True) -> LVLM:
        """Load the model, or without ``weights`` its architecture, which is enough to count a run's cost."""
        with stages(1, "loading the model"):
            return load_model(**self.model, weights=weights)

    def detectors(self, lvlm: LVLM | None = None) -> dict[str, Any]:
        """The detectors that are given, or found by ``lvlm`` on the images of ``calibrate``; else None."""
        out = {k: parse_detector(getattr(self, k)) for k in ("v_detector", "l_detector")}
        if lvlm is not None and self.calibrate is not None and None in out.values():
            from sinkscope.detectors import calibrate

            samples = [lvlm.prepare(images=r["image"], text=r["question"]) for r in self.calibrate]
            found = calibrate(lvlm, samples, progress=sys.stderr.isatty())
            out = {name: given or getattr(found, name) for name, given in out.items()}
        return out


def read_recipe(
    section: str,
    path: str | None,
    flags: Mapping[str, Any],
    function: Callable[..., Any],
    trust_remote_code: bool = False,
) -> Recipe:
    """Read the settings of a command from the YAML file at ``path``, if any, and from the ``flags``.

    Flags have the shape of a recipe; None takes back what the recipe says. Options are arguments of the
    ``function`` behind the command. A recipe cannot set ``trust_remote_code`` without the command line.
    """
    whole = {} if path is None else read_yaml(path)
    top = {k: v for k, v in whole.items() if k not in COMMANDS}
    mine = whole.get(section) or {}
    if not isinstance(mine, Mapping):
        raise InputError(f"Got {section}: {mine!r} in {path}; expected keys and values below it.")
    check_keys(top, [*SHARED, *COMMANDS], f"at the top of {path}")
    settings = merged(merged(top, mine), flags)
    for key, word in SHORT.items():
        value = settings.get(key)
        value = {} if value is None else as_long(value, word)
        if not isinstance(value, Mapping):
            raise InputError(f"Got {key}: {value!r}; expected a word or keys and values.")
        settings[key] = dict(value)
    model, data, other = (settings[key] for key in SHORT)
    known = [n for n in list(inspect.signature(function).parameters)[2:] if n not in NOT_WORDS]
    check_keys(settings, [*SHARED, *known], f"for sinkscope {COMMANDS[section]}")
    check_keys(model, MODEL_KEYS, "under model")
    asked = model.get("trust_remote_code", False)
    check_flags(trust_remote_code=False if asked is None else asked)
    if asked and not trust_remote_code:
        raise InputError(
            f"Got trust_remote_code: true for {model.get('name')!r} in the recipe alone, which runs code from "
            "there; expected --trust-remote-code on the command line too, if you have read that code."
        )
    if trust_remote_code:
        model["trust_remote_code"] = True
    for name, given, write in (("model", model, "MODEL"), ("data", data, "--data")):
        if not given.get(SHORT[name]):
            raise InputError(f"Got no {name}; write {name} in the recipe or give {write}.")
    for name, example in EXAMPLES.items():
        if not isinstance(settings.get(name), (str, type(None))):
            raise InputError(f"Got {name}: {settings[name]!r}; expected a word, such as {example}.")
    data = {"split": "train", **data} if section == "train" else data
    other = {"split": "validation", **other} if other else other
    return Recipe(
        model=model,
        data=as_questions(data, "data"),
        calibrate=as_questions(other, "calibrate") if other else None,
        **{name: settings.get(name) for name in EXAMPLES},
        conditions=settings.get("conditions") or {},
        options={k: v for k, v in settings.items() if k not in SHARED and v is not None},
    )


def read_yaml(path: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; InputError if there is none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Got the recipe {path!r}, which cannot be read: {error}.") from error
    if isinstance(whole := parse_yaml(text, f"the recipe {path!r}"), dict):
        return whole
    kind = type(whole).__name__
    raise InputError(f"Got the recipe {path!r} with {kind}; expected keys: 'model: bundled'.")


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number; YAML 1.1 takes it for text."""


NUMBER = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, [*"-+0123456789"])


def parse_yaml(text: str, where: str) -> Any:
    """Read the value of a YAML text, or raise an InputError that says ``where`` it stands."""
    try:
        return yaml.load(text, Loader)  # a safe loader
    except yaml.YAMLError as error:
        raise InputError(f"Got {where}, which is no YAML: {error}") from error


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Join two settings, of which the second wins, also inside mappings.

    Where the second names another model or data set, nothing of the first one is kept.
    """
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        if key in SHORT:
            below, value = (as_long(x, SHORT[key]) for x in (below, value))
        if isinstance(below, Mapping) and isinstance(value, Mapping) and key != "conditions":
            other = key in SHORT and value.get(SHORT[key]) not in (None, below.get(SHORT[key]))
            value = dict(value) if other else merged(below, value)
        out[key] = value
    return out


def as_long(value: Any, name: str) -> Any:
    """A word as a mapping of one; anything else as it is."""
    return {name: value} if isinstance(value, str) else value


def as_questions(given: Mapping[str, Any], key: str) -> Questions:
    """The questions of a ``data`` mapping."""
    from sinkscope.data.questions import Questions

    check_keys(given, [f.name for f in fields(Questions)], f"under {key}")
    return Questions(**given)


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse keys that mean nothing ``where`` they stand."""
    for key in given:
        if key not in known:
            raise InputError(f"Got the key {key!r} {where}. {nearest(str(key), known)}")


def arguments_for(function: Callable[..., Any], value: Any, where: str) -> dict[str, Any]:
    """Keys and values that a function takes; refuses unknown and missing ones."""
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"Got {value!r} {where}; expected keys and values.")
    given = dict(value or {})
    known = inspect.signature(function).parameters
    check_keys(given, list(known), where)
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing:
        raise InputError(f"Got {sorted(given)} {where}; expected {missing} too.")
    return given


def load_model(name: str, *, weights: bool = True, **options: Any) -> LVLM:
    """Load ``"example"``, ``"bundled"``, a folder (``"./example"`` too) or a hub repository.

    Without ``weights`` the architecture of a folder or repository alone is built. ``options`` are arguments
    of ``LVLM.from_pretrained``; None stands for what is not given.
    """
    check_word(name)
    off = {"remote": False, "trust_remote_code": False}
    given = {k: v for k, v in options.items() if v is not None and v is not off.get(k)}
    if name in WORDS or not sys.stderr.isatty():  # loading takes no time, or nobody watches
        from transformers.utils import logging

        logging.disable_progress_bar()
    if name in WORDS:
        return _of_the_package(name, given)
    from sinkscope.models import LVLM

    if not weights:
        kept = given.keys() & {"revision", "attn_implementation", "trust_remote_code"}
        given = {"remote": True, **{key: given[key] for key in kept}}
    load: Any = LVLM.from_pretrained
    return load(name, **given)


def check_word(name: Any) -> None:
    """Refuse a mistyped word, neither a folder nor ``owner/name``, before anything asks the network."""
    if not isinstance(name, str) or name in WORDS or set(name) & {"/", "\\"}:
        return
    close = get_close_matches(name.lower(), WORDS, n=1)
    if close and not Path(name).expanduser().exists():
        raise CheckpointError(
            f"Got the model {name!r}; expected 'bundled', 'example', a folder that is there, or a hub "
            f"repository such as 'llava-hf/llava-1.5-7b-hf'. {nearest(name.lower(), close)}"
        )


def _of_the_package(name: str, given: dict[str, Any]) -> LVLM:
    """A model of the package, moved as a whole; ``"auto"`` is the GPU where there is one."""
    device = given.pop("device_map", None)
    for key in given.keys() - {"dtype", "attn_implementation"}:
        raise InputError(
            f"Got {key}={given[key]!r} for {name!r}, a model of the package, which takes none: leave it out."
        )
    if given.get("dtype") == "auto":
        del given["dtype"]
    if name == "example":
        from sinkscope.example.load import load_example as load
    else:
        from sinkscope.bundled import load_bundled as load
    lvlm = load(**given)
    if device is None:
        return lvlm
    import torch

    try:
        there = "cuda" if torch.cuda.is_available() else "cpu"
        lvlm.module.to(torch.device(there if device == "auto" else device))
    except (RuntimeError, AssertionError, TypeError) as error:  # what torch raises without CUDA
        raise InputError(
            f"Got device_map={device!r} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "expected 'auto', 'cpu' or a GPU that is here, such as 'cuda:0'."
        ) from error
    return lvlm


def parse_detector(spec: str | None) -> Detector | None:
    """Make a detector of words such as ``norm:100`` (see `FORMS`, else a DetectorError); None stays None."""
    if spec is None:
        return None
    name, *rest = spec.split(":")
    if name not in FORMS:
        raise DetectorError(f"Got the detector {spec!r}. {nearest(name, FORMS)} {HELP}")
    from sinkscope import detectors as rules

    def dims(channels: str, tau: str, normalize: str = "rms") -> Detector:
        check_choice(("rms", "none"), normalize=normalize)
        wanted = tuple(int(d) for d in channels.split(","))
        return rules.SinkDimensions(wanted, float(tau), normalize)

    def received(limit: str = "0.3") -> Detector:
        number = float(limit.removesuffix("x"))
        return rules.Received(times_null=number) if limit.endswith("x") else rules.Received(number)

    makers: dict[str, Callable[..., Detector]] = {
        "norm": lambda tau: rules.Norm(tau if tau in ("valley", "3sigma") else float(tau)),
        "valley": lambda: rules.Norm("valley"),
        "3sigma": lambda: rules.Norm("3sigma"),
        "dims": dims,
        "massive": lambda a="100", ratio="1000": rules.Massive(float(a), float(ratio)),
        "received": received,
        "cosine": lambda threshold="0.9": rules.CosineToBOS(float(threshold)),
        "cls": lambda: rules.VisionTokens("cls"),
        "register": lambda: rules.VisionTokens("register"),
    }
    try:
        return makers[name](*rest)
    except (TypeError, ValueError) as error:
        raise DetectorError(f"Got the detector {spec!r}; expected {FORMS[name]}.") from error


@contextmanager
def stages(total: int, first: str) -> Iterator[Callable[[str], None]]:
    """Show what is done, a bar or lines on standard error; yields what ends a stage and names the next."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=first, disable=None, leave=False) as bar:

        def step(text: str, ended: int = 1) -> None:
            if bar.disable:
                print(f"sinkscope: {text} ...", file=sys.stderr, flush=True)
            bar.update(ended)
            bar.set_description(text)

        step(first, 0)
        yield step
