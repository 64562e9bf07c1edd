"""A sweep on disk: a manifest and one Parquet part per image, each complete or not there.

::

    out/
      manifest.json        what was run; another run is refused here
      .lock                held by the process that writes; a second one is refused
      part-000000.parquet  all cells of the questions about the first image
      part-000001.parquet  ...

A file is written under another name, flushed, and renamed. So a process may be killed at any moment:
a part is there as a whole or not at all, and the next run makes those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sinkscope.errors import CheckpointError
from sinkscope.experiments.sweeps.grid import GROUPS
from sinkscope.folders import check_place, claim, held, read_json, write_whole

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = pa.schema(
    [
        ("item", pa.int64()),
        ("image_id", pa.string()),
        ("task", pa.string()),
        ("layer", pa.int64()),
        ("edited", pa.int64()),
        ("pair", pa.int64()),
        ("s_v", pa.float64()),
        ("s_rest", pa.float64()),
        ("score", pa.float64()),
        ("base_score", pa.float64()),
        ("logprob", pa.float64()),
        ("base_logprob", pa.float64()),
        ("n_v", pa.int64()),
        ("n_rest", pa.int64()),
    ]
)
WITH_L = SCHEMA.insert(SCHEMA.get_field_index("s_rest"), pa.field("s_l", pa.float64())).insert(
    SCHEMA.get_field_index("n_rest") + 1, pa.field("n_l", pa.int64())
)
"""The same for triples."""
FORMATS = {2: 2, 3: 3}
"""Number of coefficients -> format of the parts, as a manifest states it."""
ORDER = [("item", "ascending"), ("layer", "ascending"), ("pair", "ascending")]
MANIFEST = "manifest.json"


def as_table(lines: Sequence[Mapping[str, Any]], *, with_l: bool) -> pa.Table:
    """Lines of a sweep as a table of fixed columns; with triples there are two more."""
    return pa.Table.from_pylist(list(lines), schema=WITH_L if with_l else SCHEMA)


def as_frame(tables: Sequence[pa.Table], manifest: Mapping[str, Any]) -> pd.DataFrame:
    """Parts as one data frame: sorted by question, layer and pair, always of the same dtypes."""
    whole = pa.concat_tables(tables) if tables else schema_of(manifest).empty_table()
    return whole.sort_by(ORDER).to_pandas()


def schema_of(manifest: Mapping[str, Any]) -> pa.Schema:
    """The columns of a sweep's parts."""
    return WITH_L if len(manifest["grid"][0]) == len(GROUPS[3]) else SCHEMA


class Folder:
    """Where a sweep is written.

    Args:
        path: The folder; it is made if it does not exist.
        manifest: What is run, as plain values.

    Raises:
        InputError: If the folder holds another sweep, with the differences, or other files.
    """

    def __init__(self, path: str | Path, manifest: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self.with_l = schema_of(manifest) is WITH_L
        claim(self.path, MANIFEST, manifest, "sweep")

    def held(self) -> AbstractContextManager[None]:
        """Keep other processes out; see `sinkscope.folders.held`."""
        return held(self.path, "sweep")

    def part(self, group: int) -> Path:
        """The part of an image group."""
        return self.path / f"part-{group:06d}.parquet"

    def done(self, group: int) -> bool:
        """Whether a group is there."""
        return self.part(group).exists()

    def write(self, group: int, lines: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
        """Write a group, whole or not at all.

        Args:
            group: Its number.
            lines: Its cells.
            notes: What a reader should know about it.
        """
        table = as_table(lines, with_l=self.with_l)
        table = table.replace_schema_metadata({"notes": json.dumps(list(notes))})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_whole(self.part(group), sink.getvalue().to_pybytes())


def check_out(path: str | Path) -> None:
    """Refuse a place where no sweep can be written; nothing is left behind there.

    Raises:
        InputError: If it is a file, or holds other files.
        CheckpointError: If it cannot be written.
    """
    check_place(Path(path).expanduser(), MANIFEST, "sweep")


def read_manifest(path: Path) -> dict[str, Any]:
    """What a folder says it holds.

    Raises:
        CheckpointError: If there is no manifest, it cannot be read, or its format is another one.
    """
    found = read_json(path / MANIFEST, "Name the folder that ss.sweep(..., out=folder) wrote.")
    known = sorted(FORMATS.values())
    if found.get("format") not in known:
        raise CheckpointError(
            f"Got {str(path)!r} with a sweep of format {found.get('format')!r}, by another version of "
            f"sinkscope {found.get('versions', {}).get('sinkscope', '')}; expected one of {known}. "
            "Read it with that version, or run the sweep again into another folder."
        )
    return found


def read_parts(path: Path, manifest: Mapping[str, Any]) -> tuple[list[pa.Table], list[str]]:
    """The parts of a folder, and their notes.

    Raises:
        CheckpointError: If one cannot be read.
    """
    tables, notes = [], []
    for file in sorted(path.glob("part-*.parquet")):
        try:
            table = pq.read_table(file, schema=schema_of(manifest))
            said = pq.read_schema(file).metadata or {}
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError(
                f"Could not read {str(file)!r} ({error}); expected a part of a sweep. Delete this "
                "file and run the sweep again: only its image is computed."
            ) from error
        notes.extend(json.loads(said.get(b"notes", b"[]")))
        tables.append(table)
    return tables, notes
