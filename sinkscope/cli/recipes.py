"""Recipes: what ``sinkscope sweep``, ``train-lsg`` and ``compare`` do, from a YAML file or flags.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sinkscope.checks import check_flags
from sinkscope.cli.names import load_model, parse_detector, stages
from sinkscope.errors import InputError, nearest

if TYPE_CHECKING:
    from sinkscope.data.questions import Questions
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
METHODS = ("var", "sink_to_front", "token_weights", "fixed_coefficients")  # made of plain values


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
        asked = {"v_detector": self.v_detector, "l_detector": self.l_detector}
        out = {k: None if spec is None else parse_detector(spec) for k, spec in asked.items()}
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
    *,
    trust_remote_code: bool = False,
) -> Recipe:
    """Read the settings of a command from the YAML file at ``path``, if any, and from the ``flags``.

    Flags have the shape of a recipe; None takes back what the recipe says. Options are arguments of the
    ``function`` behind the command. ``trust_remote_code`` is whether the command line says so: a recipe,
    which anybody may have written, does not say it alone.
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
    if section == "train":
        data.setdefault("split", "train")
    return Recipe(
        model=model,
        data=as_questions(data, "data"),
        calibrate=as_questions({"split": "validation", **other}, "calibrate") if other else None,
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
    whole = parse_yaml(text, f"the recipe {path!r}")
    if not isinstance(whole, dict):
        kind = type(whole).__name__
        raise InputError(f"Got the recipe {path!r} with {kind}; expected keys: 'model: bundled'.")
    return whole


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


def condition(name: str, what: Any, lvlm: LVLM) -> Any:
    """Make one condition of a comparison, of ``[]`` or a mapping with one key.

    ``gate: folder``; ``stack: folder`` of a saved stack or ``stack: [folder, ...]`` of gates; ``edit: {kind,
    edit, ...}`` (see `EditSinks`); ``random_tokens: {condition: ..., count, seed}``; or one of `METHODS`.
    """
    from sinkscope.experiments import EditSinks, baselines

    keys = ("gate", "stack", "edit", "random_tokens", *METHODS)
    if what in ([], {}, None, "base"):
        return []
    if not isinstance(what, Mapping) or len(what) != 1 or next(iter(what)) not in keys:
        raise InputError(
            f"Got the condition {name}: {what!r}; expected [] or one of the keys {list(keys)}, such as "
            "{gate: folder} or {var: {preset: code}}."
        )
    ((key, value),) = what.items()
    if key in ("gate", "stack"):
        return gates_of(name, key, value, lvlm)
    made = EditSinks if key == "edit" else getattr(baselines, key)
    arguments = arguments_for(made, value, f"under {key} of the condition {name}")
    if key == "random_tokens":
        arguments["condition"] = condition(name, arguments["condition"], lvlm)
    return made(**arguments)


def gates_of(name: str, key: str, value: Any, lvlm: LVLM) -> list[Any]:
    """A gate, or several."""
    from sinkscope.lsg import LSG

    folders: Any = value if key == "stack" and isinstance(value, list) else [value]
    if not folders or not all(isinstance(one, str) for one in folders):
        wanted = "a folder or a list of folders" if key == "stack" else "a folder"
        raise InputError(f"Got {key}: {value!r} in the condition {name}; expected {wanted}.")
    if key == "stack" and isinstance(value, str):
        return LSG.load_stack(value, lvlm=lvlm)
    return [LSG.from_pretrained(one, lvlm=lvlm) for one in folders]


def named_gates(folders: Sequence[str]) -> dict[str, dict[str, str]]:
    """Name the conditions of ``--gate``, each by the shortest end of its path that tells it from the others."""
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise InputError(f"Got --gate {twice[0]} more than once; expected every folder once.")
    out = {}
    for folder, path in zip(folders, paths, strict=True):
        depth = 1
        while sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) > 1:
            depth += 1
        out["/".join(path.parts[-depth:])] = {"gate": folder}
    return out
