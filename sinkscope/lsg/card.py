"""The model card of a gate, written from its config and from the record of its training."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sinkscope.errors import InputError
from sinkscope.lsg.storage import REPOSITORY

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG

SHOWN = 8
"""A list that is longer is summed up; training.json has it whole."""

GATE = """{front}# A sink gate after block {layer} of {kind}

Layer-wise Sink Gating ([2604.03316](https://arxiv.org/abs/2604.03316)) as made by sinkscope: it reads the output of
block {layer} and multiplies the attention keys of image tokens in block {edited} by coefficients for the groups {groups}.
The model itself is unchanged and not included. {parameters:,} parameters.

```python
import sinkscope as ss

gate = ss.LSG.from_pretrained("path/to/this/folder", lvlm=lvlm)  # refuses another model
lvlm.generate(sample, interventions=[gate])
```

## Training

{training}

## Choices

{choices}

## Made for

{made_for}
"""

STACK = """{front}# A stack of {many} sink gates

Layer-wise Sink Gating ([2604.03316](https://arxiv.org/abs/2604.03316)) as made by sinkscope. Each folder is a gate of
its own, with its own card; together they are a list of interventions.

```python
import sinkscope as ss

gates = ss.LSG.load_stack("path/to/this/folder", lvlm=lvlm)  # refuses another model
lvlm.generate(sample, interventions=gates)
```

## Gates

{gates}

## Training

{training}
"""


def of_gate(gate: LSG, record: Mapping[str, Any] | None) -> str:
    """The card of one gate."""
    config = gate.config.to_dict()
    made_for = config.pop("model")
    config.pop("weights")
    layer = gate.config.layer
    return GATE.format(
        front=front_matter(record),
        layer="(none: the embeddings)" if isinstance(layer, str) else layer,
        edited=gate.config.edited,
        kind=escaped(f"a {made_for.get('model_type', 'model')} model"),
        groups=", ".join(gate.groups),
        parameters=sum(p.numel() for p in gate.parameters()),
        training=training_of(gate, record),
        choices=table(config),
        made_for=table(made_for),
    )


def of_stack(gates: Sequence[LSG], names: Sequence[str], record: Mapping[str, Any] | None) -> str:
    """The card of a stack."""
    lines = ["| folder | training |", "|---|---|"]
    for gate, name in zip(gates, names, strict=True):
        state = "see its card" if gate.record else unrecorded(gate)
        lines.append(f"| [{name}]({name}/README.md) | {state} |")
    if record is None:
        training = (
            "No record of a common training was given. The gates' own cards say how each was made."
        )
    else:
        training = table(record)
    return STACK.format(
        front=front_matter(record), many=len(gates), gates="\n".join(lines), training=training
    )


def front_matter(record: Mapping[str, Any] | None) -> str:
    """What the hub reads. JSON strings are YAML."""
    lines = ["library_name: sinkscope", "tags: [attention-sinks, layer-wise-sink-gating]"]
    base = (record or {}).get("base_model")
    if isinstance(base, str) and REPOSITORY.match(base):
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---", ""])


def training_of(gate: LSG, record: Mapping[str, Any] | None) -> str:
    """The section on training: what the record says, or that there is none."""
    if record is not None:
        mine = table(own_part(record, gate.layer))
        return f"As recorded by who trained it; long lists are summed up here.\n\n{mine}"
    return unrecorded(gate)


def own_part(record: Mapping[str, Any], layer: int | str) -> dict[str, Any]:
    """The record without what it says of other gates, and without this gate's choices, shown below."""
    out = dict(record)
    if isinstance(record.get("results"), Mapping):
        out["results"] = {k: v for k, v in record["results"].items() if k == str(layer)}
    if isinstance(record.get("gates"), Mapping):
        out["trained_together"] = sorted(str(name) for name in record["gates"])
        del out["gates"]
    return out


def unrecorded(gate: LSG) -> str:
    """What can be said without a record."""
    if not bool(gate.outer.weight.any()) and not bool(gate.outer.bias.any()):
        each = gate.config.scale / len(gate.groups)
        return f"**Untrained.** Its last layer is zero, so every coefficient is {each:g}."
    return "**Not recorded.** Its parameters are not those of a new gate; how they came about is unknown."


def table(data: Mapping[str, Any]) -> str:
    """Plain data as a table, nested names dotted."""
    lines = ["| what | value |", "|---|---|"]
    lines += [f"| {escaped(name)} | {escaped(shown(value))} |" for name, value in leaves(data)]
    return "\n".join(lines)


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested data."""
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: Any) -> str:
    """One value in words."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, list):
        return "none" if value is None else str(value)
    if len(value) <= SHOWN and not any(isinstance(one, (list, dict)) for one in value):
        return ", ".join(shown(one) for one in value) or "none"
    last = value[-1]
    if isinstance(last, dict):
        return f"{len(value)} entries, the last: " + ", ".join(
            f"{name} {shown(one)}" for name, one in last.items()
        )
    if all(isinstance(one, (int, float)) for one in value):
        return (
            f"{len(value)} values: first {shown(value[0])}, last {shown(last)}, smallest "
            f"{shown(min(value))}, largest {shown(max(value))}"
        )
    return f"{len(value)} entries, the last: {shown(last)}"


def escaped(text: str) -> str:
    """Text that cannot break out of a table cell."""
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


def plain_record(record: Any) -> dict[str, Any] | None:
    """A training record as plain data.

    Raises:
        InputError: If it is no dictionary, or holds what is no plain data.
    """
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise InputError(
            f"Got a record of type {type(record).__name__}; expected a dictionary, such as "
            "result.record of train_lsg."
        )
    return plain(record, "record")


def plain(value: Any, name: str) -> Any:
    """Numbers, text, lists and dictionaries; what is not finite becomes a word."""
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
