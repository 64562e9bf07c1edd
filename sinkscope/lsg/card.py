"""A gate as plain data, and the model card of a gate or a stack."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from sinkscope.errors import InputError
from sinkscope.lsg.config import GateConfig
from sinkscope.lsg.sources import REPOSITORY, leaves

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Layer-wise Sink Gating ([2604.03316](https://arxiv.org/abs/2604.03316)) as made by sinkscope. {{ about }}

```python
import sinkscope as ss

{{ load }}("path/to/this/folder", lvlm=lvlm)  # refuses another model
lvlm.generate(sample, interventions={{ use }})
```
{% for heading, text in sections.items() %}
## {{ heading }}

{{ text }}
{% endfor %}"""


class SavedGate(NamedTuple):
    """One gate as plain data: its choices, its tensors by name, and how it was trained."""

    config: GateConfig
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any] | None


def gate_card(gate: SavedGate, record: Mapping[str, Any] | None) -> bytes:
    """The card of one gate; of a record made with others it has this gate's part."""
    config, layer = gate.config.to_dict(), gate.config.layer
    model, _ = config.pop("model"), config.pop("weights")
    where = "the embeddings" if layer == "embed" else f"block {layer}"
    training = unrecorded(gate)
    if record is not None:
        mine = dict(record)
        if isinstance(record.get("results"), Mapping):
            mine["results"] = {k: v for k, v in record["results"].items() if k == str(layer)}
        if isinstance(mine.get("gates"), Mapping):
            mine["trained_together"] = sorted(map(str, mine.pop("gates")))
        training = f"As recorded by who trained it; long lists are summed up here.\n\n{table(mine)}"
    count = sum(value.numel() for value in gate.tensors.values())
    return card_of(
        record,
        title=f"A sink gate that reads {where} of a {escaped(model.get('model_type', ''))} model",
        about=f"It multiplies the attention keys of image tokens in block {gate.config.edited} by "
        f"coefficients for the groups {', '.join(gate.config.groups)}. The model itself is unchanged "
        f"and not included. {count:,} parameters.",
        load="gate = ss.LSG.from_pretrained",
        use="[gate]",
        sections={"Training": training, "Choices": table(config), "Made for": table(model)},
    )


def stack_card(gates: Mapping[str, SavedGate], record: Mapping[str, Any] | None) -> bytes:
    """The card of a stack: its gates by folder."""
    made = {k: "see its card" if one.record else unrecorded(one) for k, one in gates.items()}
    rows = [f"| [{name}]({name}/README.md) | {how} |" for name, how in made.items()]
    none = "No record of a common training was given. The gates' own cards say how each was made."
    return card_of(
        record,
        title=f"A stack of {len(gates)} sink gates",
        about="Each folder is a gate of its own; together they are a list of interventions.",
        load="gates = ss.LSG.load_stack",
        use="gates",
        sections={
            "Gates": "\n".join(["| folder | training |", "|---|---|", *rows]),
            "Training": none if record is None else table(record),
        },
    )


def unrecorded(gate: SavedGate) -> str:
    """What can be said without a record."""
    if not gate.tensors["outer.weight"].any() and not gate.tensors["outer.bias"].any():
        each = gate.config.scale / len(gate.config.groups)
        return f"**Untrained.** Its last layer is zero, so every coefficient is {each:g}."
    return "**Not recorded.** It is not a new gate; how its parameters came about is unknown."


def card_of(record: Mapping[str, Any] | None, **parts: Any) -> bytes:
    """A card: ``title``, ``about``, ``load``, ``use`` and ``sections`` (heading -> text)."""
    base = (record or {}).get("base_model")
    named = isinstance(base, str) and REPOSITORY.match(base)
    tags = ["attention-sinks", "layer-wise-sink-gating"]
    front = {"library_name": "sinkscope", "tags": tags, "base_model": base if named else None}
    card = ModelCard.from_template(ModelCardData(**front), template_str=TEMPLATE, **parts)
    return str(card).encode()


def table(data: Mapping[str, Any]) -> str:
    """Plain data as a table, nested names dotted."""
    lines = [f"| {escaped(name)} | {escaped(shown(value))} |" for name, value in leaves(data)]
    return "\n".join(["| what | value |", "|---|---|", *lines])


def shown(value: Any) -> str:
    """One value in words; a list of more than eight is summed up, and training.json has it whole."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(one)}" for name, one in value.items()) or "none"
    if not isinstance(value, list) or not value:
        return "none" if value in (None, []) else str(value)
    if len(value) <= 8 and not any(isinstance(one, (list, dict)) for one in value):
        return ", ".join(shown(one) for one in value)
    if all(isinstance(one, (int, float)) for one in value):
        first, last, least, most = map(shown, (value[0], value[-1], min(value), max(value)))
        return f"{len(value)} values: first {first}, last {last}, smallest {least}, largest {most}"
    return f"{len(value)} entries, the last: {shown(value[-1])}"


def escaped(text: str) -> str:
    """Text that cannot break out of a table cell."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


def plain(value: Any, name: str = "record") -> Any:
    """Numbers, text, lists and dictionaries; what is not finite becomes a word, the rest an error."""
    if isinstance(value, (np.generic, torch.Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(one, f"{name}[{key!r}]") for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(one, f"{name}[{place}]") for place, one in enumerate(value)]
    if isinstance(value, (Path, torch.dtype, torch.device, date)):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise InputError(
        f"Got {name} of type {type(value).__name__}; expected plain data: numbers, text, lists and "
        "dictionaries. Write what matters of it as text."
    )


def plain_record(record: Any) -> Any:
    """A training record as plain data, or None; an InputError if it is something else."""
    if record is not None and not isinstance(record, Mapping):
        raise InputError(
            f"Got a record of type {type(record).__name__}; expected a dictionary, such as "
            "result.record of train_lsg."
        )
    return plain(record)
