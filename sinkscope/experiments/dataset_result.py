"""DatasetTrace: the sinks of a data set on disk; its tables, figures and text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from matplotlib.figure import Figure

from sinkscope.checks import check_choice, typed
from sinkscope.errors import InputError
from sinkscope.experiments.dataset_files import GROUPS, MANIFEST, SCHEMAS, Parts
from sinkscope.experiments.statistics import cluster_intervals
from sinkscope.files import AGAIN, read_json, unseal
from sinkscope.viz import dataset as figures

KINDS = ("V", "L", "text", "attention")


@dataclass(frozen=True, eq=False)
class DatasetTrace:
    """The sinks of a data set, in a folder; tables are read when they are asked for.

    ``settings`` say what was run, ``parts`` are the names of what is done, ``finished`` is whether that is
    all. Means count every record once; intervals resample images (records with one ``image_id``), at
    ``level``, by ``draws`` and ``seed`` of `cluster_intervals`. Records that could not be read are in
    `images` only.
    """

    folder: Path
    settings: Mapping[str, Any]
    parts: tuple[str, ...]
    finished: bool

    @classmethod
    @typed
    def load(cls, out: str | Path) -> DatasetTrace:
        """Read what ``trace_dataset(..., out=out)`` wrote, finished or not; CheckpointError if it holds none,
        or a file of it was damaged."""
        path = Path(out).expanduser()
        advice = (
            f"Name the folder that ss.trace_dataset(..., out=folder) wrote. If it is that: {AGAIN}"
        )
        found = unseal(read_json(path / MANIFEST, advice), path / MANIFEST, AGAIN)
        parts = Parts(path, found)
        return cls(path, found, tuple(sorted(parts.known)), parts.ended())

    def dataset(self, table: str = "sinks") -> pads.Dataset:
        """Open ``"images"``, ``"sinks"`` or ``"control"`` as a ``pyarrow`` data set, which reads lazily."""
        names = list(SCHEMAS)[: 2 + bool(self.settings["control"])]
        check_choice(names, table=table, hint="'control' needs trace_dataset(..., control=...).")
        files = [str(self.folder / f"{table}-{name}.parquet") for name in self.parts]
        if not files:
            return pads.dataset(SCHEMAS[table].empty_table())
        return pads.dataset(files, schema=SCHEMAS[table], format="parquet")

    @property
    def images(self) -> pd.DataFrame:
        """One line per record, all in memory; the record's own columns stand last, under their names."""
        table = self.dataset("images").to_table().to_pandas()
        own = pd.DataFrame([json.loads(text) for text in table.pop("fields")], index=table.index)
        return pd.concat([table, own], axis=1)

    @property
    def sinks(self) -> pd.DataFrame:
        """One line per sink, all in memory: the fields of `SinkRecord`, and its place in the picture,
        ``x0``, ``y0``, ``x1`` and ``y1`` from 0 to 1."""
        return self.dataset("sinks").to_table().to_pandas()

    def _read(self, table: str, columns: list[str], where: Any = None) -> Iterator[pa.RecordBatch]:
        how: Any = {"batch_readahead": 1, "fragment_readahead": 1}
        yield from self.dataset(table).to_batches(columns=columns, filter=where, **how)

    def _per_image(self, columns: list[str]) -> tuple[list[str], dict[str, np.ndarray]]:
        """Image ids and numbers ``[record ...]`` of records that were read."""
        ids: list[str] = []
        found: dict[str, list[Any]] = {name: [] for name in columns}
        for batch in self._read("images", ["image_id", *columns], pc.field("problem").is_null()):
            ids += batch.column("image_id").to_pylist()
            for name in columns:
                found[name] += [
                    np.asarray(x, dtype=np.float32) for x in batch.column(name).to_pylist()
                ]
        if not ids:
            raise InputError(
                f"Got {self!r} without an image that could be traced; expected some. See trace.images."
            )
        return ids, {name: np.array(values) for name, values in found.items()}

    def kinds(self, **intervals: Any) -> pd.DataFrame:
        """Count the sinks of each kind per record, and give the share of records with one, with intervals.

        Columns are kind, mean, mean_low, mean_high, share, low and high; kinds are those of `SinkRecord`.
        """
        columns = {kind: f"n_{kind.lower()}" for kind in KINDS}
        ids, got = self._per_image(list(columns.values()))
        values = np.stack([got[name] for name in columns.values()], axis=1).astype(float)
        parts = [
            cluster_intervals(x, ids, **intervals) for x in (values, (values > 0).astype(float))
        ]
        names = ("mean", "mean_low", "mean_high", "share", "low", "high")
        return pd.DataFrame({"kind": KINDS} | dict(zip(names, np.concatenate(parts), strict=True)))

    def by_layer(self, **intervals: Any) -> pd.DataFrame:
        """Measure every group of tokens by LLM layer: how many, and the attention mass, with intervals.

        Columns are layer, group (those of `SinkTrace.groups`), tokens (mean per record; V-sinks are as many
        in every layer), tokens_low, tokens_high, mass (mean over heads, queries and records, 0 to 1), low,
        high and null (uniform attention); NaN where that was not measured or counted.
        """
        layers, many = self.settings["layers"], len(self.settings["layers"])
        names = [f"{what}_{name}" for name in GROUPS.values() for what in ("mass", "null")]
        ids, got = self._per_image(["n_v", "l_by_layer", "text_by_layer", *names * self._masses])
        counts = {"v": np.repeat(got["n_v"][:, None], many, axis=1), "l": got["l_by_layer"]}
        counts["text_sinks"] = got["text_by_layer"]
        unknown = np.full((len(ids), many), np.nan)
        columns = [counts.get(name, unknown) for name in GROUPS.values()]
        columns += [got.get(f"mass_{name}", unknown) for name in GROUPS.values()]
        values = np.concatenate(columns, axis=1).astype(float)
        known, made = ~np.isnan(values).any(axis=0), np.full((3, values.shape[1]), np.nan)
        made[:, known] = cluster_intervals(values[:, known], ids, **intervals)
        tokens, masses = np.split(made, 2, axis=1)
        null = [got.get(f"null_{name}", unknown).mean(axis=0) for name in GROUPS.values()]
        table = pd.DataFrame({"layer": layers * len(GROUPS), "group": np.repeat([*GROUPS], many)})
        table[["tokens", "tokens_low", "tokens_high"]] = tokens.T
        table[["mass", "low", "high"]] = masses.T
        return table.assign(null=np.concatenate(null))

    @property
    def _masses(self) -> bool:
        return bool(self.settings["masses"])

    def places(self, cells: int = 16) -> dict[str, np.ndarray]:
        """Count where on the picture sinks are: per kind ``[row column]``, on ``cells`` x ``cells`` cells.

        A sink counts in the cells that its patches cover, by the shares of its area.
        """
        edges = np.linspace(0.0, 1.0, cells + 1)
        found = {kind: np.zeros((cells, cells)) for kind in ("V", "L", "attention")}
        box = ["x0", "y0", "x1", "y1"]
        for batch in self._read("sinks", ["kind", *box], ~pc.field("x0").is_null(nan_is_null=True)):
            kinds, *ends = (column.to_numpy(zero_copy_only=False) for column in batch)
            x, y = (_covered(ends[at], ends[at + 2], edges) for at in (0, 1))
            for kind, total in found.items():
                total += y[kinds == kind].T @ x[kinds == kind]
        return found

    def agreement(self, **intervals: Any) -> pd.DataFrame:
        """Compare rules: of the image tokens that one ``rule`` flags, the share that ``other`` flags.

        A token counts once per layer of the LLM, and per block of the vision tower that feeds the projector.
        Columns are tower, rule, other, flagged (by ``rule``), share, low and high: NaN where nothing is
        flagged. ``"used"`` is the rule of this run.
        """
        if not self._masses:
            raise InputError(
                "Got a run with masses=False; expected masses=True: other rules ask a pass more."
            )
        lines = []
        ids, got = self._per_image(["agree_vision", "agree_language"])
        for tower, names in self.settings["compared"].items():
            many = len(names)
            both = got[f"agree_{tower}"].reshape(len(ids), many, many).astype(float)
            own = np.repeat(np.diagonal(both, axis1=1, axis2=2), many, axis=1)  # that of ``rule``
            shares = cluster_intervals(both.reshape(len(ids), -1), ids, over=own, **intervals)
            for at, (share, low, high) in enumerate(shares.T):
                line = {"tower": tower, "rule": names[at // many], "other": names[at % many]}
                line |= {"flagged": int(own[:, at].sum()), "share": share, "low": low, "high": high}
                lines.append(line)
        return pd.DataFrame(lines)

    def lives(self) -> pd.DataFrame:
        """Count how long tokens meet the L rule: sinks by kind and unbroken stretch of layers.

        Columns are kind, born (the LLM block that wrote it; -1: it came with the embeddings), last (the last
        layer where the rule holds), both <NA> for sinks that never meet the rule, first_drawn (the first
        layer that attends to the token, -1 for none), again (whether the token had a stretch before), and
        sinks.
        """
        counts: dict[tuple[Any, ...], int] = {}
        for batch in self._read("sinks", ["kind", "llm_lives", "first_drawn"]):
            for kind, lives, drawn in zip(*(column.to_pylist() for column in batch), strict=True):
                for at, life in enumerate(lives or [{"block": None, "last": None}]):
                    first = -1 if drawn is None else drawn
                    key = kind, life["block"], life["last"], first, at > 0
                    counts[key] = counts.get(key, 0) + 1
        names = ["kind", "born", "last", "first_drawn", "again", "sinks"]
        table = pd.DataFrame([(*key, many) for key, many in counts.items()], columns=names)
        whole = dict.fromkeys(("born", "last", "first_drawn", "sinks"), "Int64")
        return table.astype(whole).sort_values(names[:5], ignore_index=True)

    def control(self, **intervals: Any) -> pd.DataFrame:
        """Pool the control: what the edit does, and what the same edit does on other tokens.

        Two lines: records with a token to edit, and all, those without counting no difference. Columns are
        records, images, edited, without, uncontrolled (too few other tokens, left out of both lines), base,
        real, control, difference (real - control) with low and high (resampling images), p (two-sided over
        the draws, each pooled over records: ``(1 + #) / (1 + draws)``), real_mass and control_mass (attention
        received).
        """
        table = self.dataset("control").to_table().to_pandas()
        states = table["state"].value_counts()
        lines = []
        for which, kept in (("edited", ["edited"]), ("all", ["edited", "without"])):
            part = table[table["state"].isin(kept)]
            line: dict[str, Any] = {"which": which, "records": len(part)}
            line |= {"images": part["image_id"].nunique()}
            line |= {
                name: int(states.get(name, 0)) for name in ("edited", "without", "uncontrolled")
            }
            lines.append(line | _pooled(part, **intervals) if states.get("edited") else line)
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        """Draw tokens and attention mass of every kind by layer; see `sinkscope.viz.plot_dataset_layers`."""
        return figures.plot_dataset_layers(self.by_layer())

    def plot_places(self, cells: int = 16) -> Figure:
        """Draw where on the normalised picture the sinks of every kind are."""
        return figures.plot_dataset_places(self.places(cells))

    def plot_agreement(self) -> Figure:
        """Draw how many of the tokens that one rule flags another flags, in both towers."""
        return figures.plot_dataset_agreement(self.agreement())

    def plot_lives(self) -> Figure:
        """Draw which block makes a sink, and the last layer in which it is one."""
        return figures.plot_dataset_lives(self.lives(), self.settings["layers"])

    def summary(self) -> str:
        """Sum up the run in a few lines, for a terminal."""
        kinds = self.kinds()
        count, problems = self._counted()
        rules, lines = self.settings["rules"], [f"{self!r}"]
        lines += [f"V rule: {rules['v']}; L rule: {rules['l']}"]
        names = {"V": "V-sinks", "L": "L-sinks", "text": "text sinks", "attention": "attended"}
        for line in kinds.to_dict("records"):
            span = f"{line['low']:.3f} to {line['high']:.3f}"
            many = f"{line['mean']:.2f} per record"
            lines.append(
                f"{names[line['kind']]:>10}: {many}; in {line['share']:.3f} of the records ({span})"
            )
        if problems:
            lines.append(
                f"{problems} of {count} records could not be read: trace.images['problem']"
            )
        return "\n".join(lines)

    def _counted(self) -> tuple[int, int]:
        whole = self.dataset("images")
        return whole.count_rows(), whole.count_rows(filter=~pc.field("problem").is_null())

    def __repr__(self) -> str:
        records, sinks = self._counted()[0], self.dataset("sinks").count_rows()
        state = "" if self.finished else "; not finished"
        return f"DatasetTrace({records} records, {sinks} sinks and attended tokens{state})"


def _covered(low: np.ndarray, high: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of every interval that lies in each cell, ``[interval cell]``."""
    first, last = np.maximum(low[:, None], edges[:-1]), np.minimum(high[:, None], edges[1:])
    return (last - first).clip(0.0) / (high - low)[:, None]


def _pooled(part: pd.DataFrame, **intervals: Any) -> dict[str, Any]:
    """The numbers of `DatasetTrace.control` over some records."""
    real, draws = part["real"].to_numpy(), np.stack(part["controls"].to_list()).astype(float)
    change = (real - draws.mean(axis=1))[:, None]
    mean, low, high = cluster_intervals(change, list(part["image_id"]), **intervals)[:, 0]
    pooled, centre = draws.mean(axis=0), draws.mean()
    far = np.abs(pooled - centre) >= abs(real.mean() - centre) - 1e-12
    found = {"base": part["base"].mean(), "real": real.mean(), "control": centre}
    found |= {"difference": mean, "low": low, "high": high, "p": (1 + far.sum()) / (1 + len(far))}
    found["real_mass"] = part["real_mass"].mean()
    return found | {"control_mass": float(np.mean(np.stack(part["masses"].to_list())))}
