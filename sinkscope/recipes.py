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
from sinkscope.errors import InputError, nearest
from sinkscope.named import load_model
from sinkscope.specs import parse_detector
from sinkscope.stages import stages

if TYPE_CHECKING:
    from sinkscope.experiments.questions import Questions
    from sinkscope.models import LVLM

SECTIONS = ("sweep", "train", "compare")
MODEL_KEYS = (
    "name",
    "dtype",
    "device_map",
    "revision",
    "attn_implementation",
    "quantization_config",
    "trust_remote_code",
)
NOT_WORDS = (
    "accelerator",
    "calibration",
    "dry_run",
    "gates",
    "progress",
    "samples",
    "validation_data",
)
"""Arguments that a recipe cannot give."""
SHARED = ("model", "v_detector", "l_detector", "calibrate", "data", "out", "conditions")
"""Keys with a meaning of their own; the others are arguments."""


@dataclass(frozen=True)
class Recipe:
    """One command's settings.

    Attributes:
        section: ``"sweep"``, ``"train"`` or ``"compare"``.
        model: Arguments of ``LVLM.from_pretrained``; the names ``"example"`` and ``"bundled"`` are the
            models of the package.
        data: The questions.
        calibrate: Other questions, whose images the detectors are found on; or None.
        v_detector: A detector in a few words, or None.
        l_detector: Likewise.
        out: The folder to write to.
        conditions: For ``compare``: name -> what to do, see `sinkscope.commands`.
        options: Arguments of the function behind the command.
    """

    section: str
    model: Mapping[str, Any]
    data: Questions
    calibrate: Questions | None = None
    v_detector: str | None = None
    l_detector: str | None = None
    out: str | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self, *, weights: bool = True) -> LVLM:
        """The model.

        Args:
            weights: False builds the architecture alone, which is enough to count what a run costs.
        """
        given = dict(self.model)
        with stages(1, "loading the model"):
            return load_model(given.pop("name"), weights=weights, **given)

    def given_detectors(self) -> dict[str, Any]:
        """Detectors that are given; None where not."""
        asked = {"v_detector": self.v_detector, "l_detector": self.l_detector}
        return {k: None if spec is None else parse_detector(spec) for k, spec in asked.items()}

    def detectors(self, lvlm: LVLM) -> dict[str, Any]:
        """Detectors that are given, or found on the images of ``calibrate``; None where neither."""
        out = self.given_detectors()
        if self.calibrate is not None and None in out.values():
            from sinkscope.detectors import calibrate

            seen = list(self.calibrate)
            samples = [lvlm.prepare(images=r["image"], text=r["question"]) for r in seen]
            found = calibrate(lvlm, samples, progress=sys.stderr.isatty())
            for name in out:
                out[name] = out[name] or getattr(found, name)
        return out


def read_recipe(
    section: str,
    path: str | None,
    flags: Mapping[str, Any],
    function: Callable[..., Any],
    *,
    trust_remote_code: bool = False,
) -> Recipe:
    """The settings of a command.

    Args:
        section: One of `SECTIONS`.
        path: A YAML file, or None.
        flags: What was given on the command line, in the same shape. None takes back what the recipe
            says.
        function: The function behind the command, whose arguments are the options.
        trust_remote_code: Whether the command line says ``--trust-remote-code``. A recipe, which
            anybody may have written, does not say it alone.

    Raises:
        InputError: If the file is none, a key is unknown, the model or data are missing, or a recipe
            trusts the code of a repository by itself.
    """
    whole = {} if path is None else read_yaml(path)
    top = {k: v for k, v in whole.items() if k not in SECTIONS}
    mine = whole.get(section) or {}
    if not isinstance(mine, Mapping):
        raise InputError(f"Got {section}: {mine!r} in {path}; expected keys and values below it.")
    check_keys(top, [*SHARED], f"at the top of {path}", SECTIONS)
    settings = merged(merged(top, mine), flags)
    settings["model"] = as_mapping(settings.get("model"), "name", "model")
    settings["data"] = as_mapping(settings.get("data"), "source", "data")
    known = arguments_of(function)
    check_keys(settings, [*SHARED, *known], f"for sinkscope {command_of(section)}")
    check_keys(settings["model"], MODEL_KEYS, "under model")
    check_trust(settings["model"], trust_remote_code)
    for name, needed in (("model", "name"), ("data", "source")):
        if not settings[name].get(needed):
            raise InputError(
                f"Got no {name}; expected one. Write {name} in the recipe or give "
                f"{'MODEL' if name == 'model' else '--data'}."
            )
    if section == "train":
        settings["data"].setdefault("split", "train")
    other = as_mapping(settings.get("calibrate"), "source", "calibrate")
    if other:
        other.setdefault("split", "validation")
    for name in ("v_detector", "l_detector", "out"):
        if not isinstance(settings.get(name), (str, type(None))):
            raise InputError(
                f"Got {name}: {settings[name]!r}; expected a word, such as {WORDS[name]}."
            )
    return Recipe(
        section=section,
        model=settings["model"],
        data=as_questions(settings["data"], "data"),
        calibrate=as_questions(other) if other else None,
        v_detector=settings.get("v_detector"),
        l_detector=settings.get("l_detector"),
        out=settings.get("out"),
        conditions=settings.get("conditions") or {},
        options={k: v for k, v in settings.items() if k not in SHARED and v is not None},
    )


def check_trust(model: dict[str, Any], flag: bool) -> None:
    """Note the flag among the model's options; refuse a recipe that trusts without it.

    Raises:
        InputError: If so, or if the recipe says neither true nor false.
    """
    asked = model.get("trust_remote_code")
    if asked is not None:
        check_flags(trust_remote_code=asked)
    if asked and not flag:
        raise InputError(
            f"Got trust_remote_code: true for {model['name']!r} in the recipe alone; expected the flag on "
            "the command line too, because it runs code from there. If you have read and trust that "
            "code, add --trust-remote-code."
        )
    if flag:
        model["trust_remote_code"] = True


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: If there is no such file, or it holds something else.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"Got the recipe {path!r}, which cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"Got the recipe {path!r}, which is no YAML: {error}") from error
    whole = parse_yaml(text, f"the recipe {path!r}")
    if not isinstance(whole, dict):
        raise InputError(
            f"Got the recipe {path!r} with {type(whole).__name__}; expected keys and values, such as "
            "'model: bundled'."
        )
    return whole


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number; YAML 1.1 takes it for text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        InputError: If it is none.
    """
    try:
        return yaml.load(text, Loader)  # a safe loader
    except yaml.YAMLError as error:
        raise InputError(f"Got {where}, which is no YAML: {error}") from error


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two settings, of which the second wins; mappings below them are joined.

    Columns and options belong to one data set, a revision to one model: where the second names
    another of them, nothing of the first is kept.
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


SHORT = {"model": "name", "data": "source", "calibrate": "source"}
"""Keys whose value may be one word, and what that word is."""
WORDS = {"v_detector": "norm:100", "l_detector": "dims:1415,2533:20", "out": "runs/map"}


def as_mapping(value: Any, name: str, key: str) -> dict[str, Any]:
    """A mapping, or a word as a mapping of one.

    Raises:
        InputError: If it is neither.
    """
    if value is None:
        return {}
    value = as_long(value, name)
    if isinstance(value, Mapping):
        return dict(value)
    raise InputError(f"Got {key}: {value!r}; expected a word or keys and values.")


def as_questions(given: Mapping[str, Any], key: str = "calibrate") -> Questions:
    """The questions of a ``data`` mapping."""
    from sinkscope.experiments.questions import Questions

    check_keys(given, [f.name for f in fields(Questions)], f"under {key}")
    return Questions(**given)


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """The options a command passes on."""
    names = list(inspect.signature(function).parameters)[2:]
    return [name for name in names if name not in (*SHARED, *NOT_WORDS)]


def check_keys(
    given: Mapping[str, Any], known: Sequence[str], where: str, also: Sequence[str] = ()
) -> None:
    """Refuse keys that mean nothing.

    Raises:
        InputError: If there is one.
    """
    for key in given:
        if key not in known and key not in also:
            raise InputError(f"Got the key {key!r} {where}. {nearest(str(key), [*known, *also])}")


def command_of(section: str) -> str:
    """The command that reads a section."""
    return "train-lsg" if section == "train" else section
