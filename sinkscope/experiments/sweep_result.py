"""A sweep: its table, its map with intervals, its best cell; in memory, and on disk part by part.

A folder holds ``manifest.json`` (what was run; another run is refused), ``.lock`` (held by the process that
writes; a second one is refused) and ``part-000000.parquet``, ...: all cells of the questions about one image.
A part is written whole or not at all. The next run makes the parts that are missing. Manifest and parts are
sealed: one that was damaged, or that is of another sweep or image, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from sinkscope.checks import check_choice, typed
from sinkscope.errors import CheckpointError
from sinkscope.experiments.findings import best_of, observe
from sinkscope.experiments.statistics import BY, by_task, cluster_intervals
from sinkscope.experiments.sweep_grid import CELL, GROUPS, NOUNS, counted, wide
from sinkscope.files import AGAIN, SEAL, claim, digest_of, read_json, unseal, writable, write_whole
from sinkscope.viz import plot_sweep

MANIFEST = "manifest.json"


def schema_of(manifest: Mapping[str, Any]) -> pa.Schema:
    """The columns of a sweep's parts; with triples there are two more."""
    names = [group.lower() for group in GROUPS[len(manifest["grid"][0])]]
    scores = ("score", "base_score", "logprob", "base_logprob")
    return pa.schema(
        {"item": pa.int64(), "image_id": pa.string(), "task": pa.string()}
        | dict.fromkeys(CELL[:3], pa.int64())
        | dict.fromkeys((*(f"s_{name}" for name in names), *scores), pa.float64())
        | dict.fromkeys((f"n_{name}" for name in names), pa.int64())
    )


def as_table(lines: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> pa.Table:
    """Lines of a sweep as a table of fixed columns."""
    return pa.Table.from_pylist(list(lines), schema=schema_of(manifest))


def as_frame(tables: Sequence[pa.Table], manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Parts as one data frame: sorted by question, layer and pair, always of the same dtypes."""
    whole = pa.concat_tables([as_table([], manifest), *tables])
    return whole.sort_by([(name, "ascending") for name in ("item", "layer", "pair")]).to_pandas()


def seal_of(manifest: Mapping[str, Any], group: int, table: pa.Table, notes: list[str]) -> str:
    """The digest of a part: of its sweep, its place there, its notes and all its cells."""
    texts = [column.to_pylist() for column in table.columns if column.type == pa.string()]
    numbers = [column.to_numpy() for column in table.columns if column.type != pa.string()]
    return digest_of([manifest, group, notes, texts], *map(np.ascontiguousarray, numbers))


def parts_of(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[pa.Table, list[str]]]:
    """Read the parts that are there, cells and notes; CheckpointError for one that is not this sweep's."""
    groups = {part_name(group): group for group in range(manifest["groups"])}
    for file in sorted(path.glob("part-*.parquet")):
        try:
            if file.name not in groups:
                raise ValueError(f"its {len(groups)} parts have other names")
            found = pq.ParquetFile(
                pa.BufferReader(file.read_bytes()), page_checksum_verification=True
            )
            table, said = found.read(), found.schema_arrow.metadata or {}
            notes = json.loads(said.get(b"notes", b""))
            if not table.schema.equals(schema_of(manifest)):
                raise ValueError("it has other columns")
            expected = seal_of(manifest, groups[file.name], table, notes)
            if said.get(SEAL.encode()) != expected.encode():
                raise ValueError("it was damaged, or is of another image, sweep or version")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CheckpointError(
                f"Got {str(file)!r}, which is no part of this sweep ({error}); expected it as it was "
                "written. Delete this file and run the sweep again: only its image is computed."
            ) from error
        yield table, notes


def part_name(group: int) -> str:
    """The name of the part of an image group."""
    return f"part-{group:06d}.parquet"


class Folder:
    """The folder of one sweep, made if it does not exist.

    Another sweep, other files and parts that were damaged are refused.
    """

    def __init__(self, path: str | Path, manifest: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self.manifest = claim(self.path, MANIFEST, manifest, "sweep")
        for _ in parts_of(self.path, self.manifest):
            pass

    def missing(self) -> list[int]:
        """The image groups that are not done."""
        groups = range(self.manifest["groups"])
        return [group for group in groups if not (self.path / part_name(group)).exists()]

    def write(self, group: int, lines: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
        """Write a group's cells and notes, whole or not at all."""
        table, sink = as_table(lines, self.manifest), pa.BufferOutputStream()
        said = {SEAL: seal_of(self.manifest, group, table, list(notes)), "notes": json.dumps(notes)}
        # A damaged page is refused before it is decoded, which could do anything; the digest is of its cells.
        pq.write_table(table.replace_schema_metadata(said), sink, write_page_checksum=True)
        with writable(self.path):
            write_whole(self.path / part_name(group), sink.getvalue().to_pybytes())


@dataclass(frozen=True, eq=False)
class Sweep:
    """Every question under every cell; ``settings`` say what was run, ``notes`` what a reader must know.

    ``table`` has one line per question, layer and pair: item, image_id, task, layer (-1 is ``"embed"``),
    edited (the block, layer + 1), pair (its number), s_v, s_rest, score and logprob (of the right answer, in
    nats), base_score and base_logprob without an edit, n_v and n_rest (V-sinks and other image tokens); with
    triples s_l and n_l too (L-sinks of what the edited block reads).

    The methods take ``by``: ``"task"``, ``"all"``, or None for what the sweep was made with; ``column``:
    ``"score"`` or ``"logprob"``; ``intervals``: ``level``, ``draws`` and ``seed`` of `cluster_intervals`.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    by: str = "task"

    @classmethod
    @typed
    def load(cls, folder: str | Path, by: str = "task") -> Sweep:
        """Read a sweep, finished or not, from what was given as ``out``; CheckpointError if it holds none."""
        check_choice(BY, by=by)
        path = Path(folder).expanduser()
        named = f"Name the folder that ss.sweep(..., out=folder) wrote. If it is that: {AGAIN}"
        found = read_json(path / MANIFEST, named)
        if isinstance(found, dict) and found.get("format", 2) not in list(GROUPS):
            raise CheckpointError(
                f"Got {str(path)!r} with a sweep of format {found['format']!r}, by another version of "
                f"sinkscope; expected one of "
                f"{list(GROUPS)}. Read it with that version, or run the sweep again into another folder."
            )
        found = unseal(found, path / MANIFEST, AGAIN)
        tables, notes = [], list(found["notes"])
        for table, said in parts_of(path, found):
            tables.append(table)
            notes += said
        if len(tables) < found["groups"]:
            notes.append(f"not finished: {len(tables)} of {found['groups']} images")
        return cls(as_frame(tables, found), found, tuple(dict.fromkeys(notes)), by)

    @property
    def score(self) -> str:
        """The name of the score: a word, or a function's module and name."""
        return str(self.settings["score"])

    @property
    def pairs(self) -> list[tuple[float, ...]]:
        """The coefficient pairs, or triples, in order."""
        return [tuple(map(float, pair)) for pair in self.settings["grid"]]

    @property
    def groups(self) -> tuple[str, ...]:
        """What the coefficients are of: ``("V", "rest")`` or ``("V", "L", "rest")``, as in a gate."""
        return GROUPS[len(self.pairs[0])]

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def base(self, by: str | None = None) -> pd.DataFrame:
        """Average what the model scores without an edit: task, n, images, score, logprob, with_v.

        ``with_v`` is the share of the questions whose image has a V-sink; triples have ``with_l`` too (an
        L-sink at some layer of the sweep).
        """
        lines = []
        for name, part in self.by_task(by):
            once = part.drop_duplicates("item")
            most = part.groupby("item")[[n for n in ("n_v", "n_l") if n in part]].max()
            line = {"task": name, "n": len(once), "images": once["image_id"].nunique()}
            line |= {column: once[f"base_{column}"].mean() for column in ("score", "logprob")}
            lines.append(line | (most > 0).mean().rename(lambda n: f"with_{n[2:]}").to_dict())
        return pd.DataFrame(lines)

    def map(
        self, by: str | None = None, *, column: str = "score", **intervals: Any
    ) -> pd.DataFrame:
        """Average the change against the base in every cell, layer x coefficients, with intervals.

        Columns are task, layer, edited, pair, s_v, s_rest (and s_l between them with triples), n, images,
        base, value, delta, low, high and clear (whether the interval excludes 0).
        """
        check_choice(("score", "logprob"), column=column)
        tables = []
        for name, part in self.by_task(by):
            cells, changes, images = wide(part, column)
            mean, low, high = cluster_intervals(changes, images, **intervals)
            base = part.drop_duplicates("item")[f"base_{column}"].mean()
            cells.insert(0, "task", name)
            cells = cells.assign(n=len(changes), images=len(set(images)), base=base)
            numbers = {"value": base + mean, "delta": mean, "low": low, "high": high}
            tables.append(cells.assign(**numbers, clear=(low > 0) | (high < 0)))
        return pd.concat(tables, ignore_index=True)

    def best(
        self, by: str | None = None, *, column: str = "score", **intervals: Any
    ) -> pd.DataFrame:
        """Choose the best cell per task on one half of its images, and score it on the other.

        Cells that scale no key, such as (0, 1) where no image has a V-sink, are left out. Columns are as in
        `map` up to s_rest, then chosen_on (change where it was chosen), n, images, delta, low, high (on the
        other half), and note (why a task has no best cell). On all images and cells, see `sign_flip_maximum`:
        maximum (the largest change), t (the same in units of its own spread over images), t_95 (the 95 %
        point of t where nothing has an effect), p (how often chance makes a t as large).
        """
        check_choice(("score", "logprob"), column=column)
        tasks = self.by_task(by)
        lines = [{"task": name, **best_of(part, column, **intervals)} for name, part in tasks]
        return pd.DataFrame(lines).astype(dict.fromkeys(CELL[:3], "Int64"))

    def plot(self, by: str | None = None, *, column: str = "score", seed: int = 0) -> Figure:
        """Draw the map per task, a dot where an interval excludes 0; see `sinkscope.viz.plot_sweep`."""
        return plot_sweep(self.map(by, column=column, seed=seed), score=self.score_text(column))

    def observations(self, by: str | None = None, *, seed: int = 0) -> str:
        """Write the three observations of Choi et al. (2604.03316) as lines of text.

        Whether the best setting depends on task or layer, and whether raising or splitting off sinks helps.
        """
        return observe(self, by or self.by, seed)

    summary = observations

    def score_text(self, column: str) -> str:
        """What a column is, with its unit."""
        named = {"exact": "exact answers (points)", "choice": "choice accuracy (points)"}
        named["logprob"] = "log-probability of the answer (nats)"
        return named.get(
            "logprob" if column == "logprob" else self.score, self.score.rpartition(".")[2]
        )

    def __repr__(self) -> str:
        counts = {"item": "question", "image_id": "image", "layer": "layer"}
        said = ", ".join(counted(self.table[name].nunique(), noun) for name, noun in counts.items())
        pairs = counted(len(self.pairs), NOUNS[len(self.groups)])
        return f"Sweep({said} x {pairs}, score={self.score!r})"

    def by_task(self, by: str | None) -> Iterator[tuple[str, Any]]:
        """The table by task, and whole at the end if there are several."""
        return by_task(self.table, self.by if by is None else by)
