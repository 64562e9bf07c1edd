"""The folder of a traced data set: the columns of its tables, and its sealed parts.

A folder holds ``manifest.json`` (what was run), ``.lock`` (held by the process that writes), and for every
part of the data set ``images-...parquet``, ``sinks-...parquet``, with a control ``control-...parquet``, and
``part-...json``, which is written last and seals them: without it a part is not there. ``end.json`` says that
the data set was read to its end. The name of a part is its place and a digest of its records.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sinkscope.errors import InputError
from sinkscope.files import AGAIN, digest_of, read_json, seal, unseal, writable, write_whole

MANIFEST, END = "manifest.json", "end.json"
KINDS = ("V", "L", "text", "attention")
GROUPS = {"V-sinks": "v", "L-sinks": "l", "ordinary": "ordinary"}
GROUPS |= {"text sinks": "text_sinks", "text": "text"}  # of a trace -> in names of columns
NUMBER, WHOLE, WORD = pa.float64(), pa.int32(), pa.string()
NUMBERS, WHOLES = pa.list_(pa.float32()), pa.list_(WHOLE)
CHANNELS = pa.list_(pa.struct({"channel": WHOLE, "value": pa.float32()}))
LIVES = pa.list_(pa.struct({"block": WHOLE, "last": WHOLE, "writer": WORD}))
RECORD = {"record": pa.int64(), "image_id": WORD}
SINKS = RECORD | {"kind": WORD, "pos": WHOLE, "word": WORD, "image": WHOLE, "row": WHOLE}
SINKS |= {"column": WHOLE, "box": NUMBERS, "vit_tokens": WHOLES}
SINKS |= dict.fromkeys(("x0", "y0", "x1", "y1"), NUMBER)
SINKS |= {"vit_token": WHOLE, "vit_kind": WORD, "vit_birth": WHOLE, "vit_writer": WORD}
SINKS |= {"vit_norm": NUMBER, "vit_channels": CHANNELS, "vit_drawn": NUMBERS, "llm_norm": NUMBER}
SINKS |= {"llm_channels": CHANNELS, "llm_birth": WHOLE, "llm_writer": WORD, "llm_layers": WHOLES}
SINKS |= {"llm_lives": LIVES, "peak_channels": CHANNELS, "first_drawn": WHOLE}
SINKS |= {"received": NUMBERS, "received_max": NUMBERS, "null": NUMBERS, "head_layer": WHOLE}
SINKS |= {"head": WHOLE} | dict.fromkeys(("head_received", "head_null", "excess", "routed"), NUMBER)
SINKS |= {"event": pa.bool_()}
SINKS |= dict.fromkeys(("contribution", "value_ratio", "stable_rank"), NUMBER)
SINKS |= {"verdict": WORD, "overlap": pa.bool_()}
IMAGES = RECORD | {"question": WORD, "fields": WORD, "problem": WORD, "widths": WHOLES}
IMAGES |= {"heights": WHOLES, "tokens": WHOLE, "image_tokens": WHOLE}
IMAGES |= dict.fromkeys(("n_v", "n_l", "n_text", "n_attention", "n_overlap"), WHOLE)
IMAGES |= dict.fromkeys(("l_by_layer", "text_by_layer", "overlap_by_layer", "v_by_block"), WHOLES)
IMAGES |= {f"{what}_{name}": NUMBERS for what in ("mass", "null") for name in GROUPS.values()}
IMAGES |= {"agree_vision": WHOLES, "agree_language": WHOLES, "chosen": WORD}
IMAGES |= {"warnings": pa.list_(WORD), "outcome_vision": WORD, "outcome_language": WORD}
IMAGES |= {"seconds": NUMBER}
CONTROL = RECORD | {"state": WORD, "tokens": WHOLE, "base": NUMBER, "real": NUMBER}
CONTROL |= {"controls": NUMBERS, "real_mass": NUMBER, "masses": NUMBERS}
SCHEMAS = {"images": pa.schema(IMAGES), "sinks": pa.schema(SINKS), "control": pa.schema(CONTROL)}


class Parts:
    """The parts in the folder of one run, by name; CheckpointError for one that was damaged."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.tables = path, list(SCHEMAS)[: 2 + bool(manifest["control"])]
        self._run = digest_of(manifest)
        self.seen = 0  # how many parts the data set has, as far as it was read
        self.known: dict[str, dict[str, Any]] = {}
        for file in sorted(path.glob("part-*.json")):
            name = file.stem.removeprefix("part-")
            advice = f"Delete {file.name} and start the same again: only this part is traced anew."
            found = read_json(file, advice)
            try:
                content = [self.file(table, name).read_bytes() for table in self.tables]
            except OSError as error:
                content = [str(error).encode()]
            self.known[name] = unseal(found, file, advice, *self._sealed(name, content))

    def file(self, table: str, name: str) -> Path:
        """Where a table of a part is."""
        return self.path / f"{table}-{name}.parquet"

    def write(self, name: str, tables: Mapping[str, pa.Table]) -> dict[str, Any]:
        """Write a part, whole or not at all, and give how many lines it has."""
        content = []
        with writable(self.path):
            for table in self.tables:
                sink = pa.BufferOutputStream()
                pq.write_table(tables[table], sink)
                content.append(sink.getvalue().to_pybytes())
                write_whole(self.file(table, name), content[-1])
            counts = {table: tables[table].num_rows for table in self.tables}
            sealed = seal(counts, *self._sealed(name, content))
            write_whole(self.path / f"part-{name}.json", json.dumps(sealed) + "\n")
        self.known[name] = counts
        return counts

    def check_ended(self) -> None:
        """Note that the data set was read to its end; InputError if there are parts behind it."""
        if more := [name for name in self.known if int(name.partition("-")[0]) >= self.seen]:
            raise InputError(
                f"Got a data set of {self.seen} parts and out={str(self.path)!r} with more, such as {more[0]}; "
                "expected the same records. Write out='another folder'."
            )
        with writable(self.path):
            write_whole(self.path / END, json.dumps(seal({"parts": self.seen}, self._run.encode())))

    def ended(self) -> bool:
        """Whether all parts of a data set that was read to its end are there."""
        file = self.path / END
        if not file.exists():
            return False
        found = unseal(read_json(file, AGAIN), file, AGAIN, self._run.encode())
        return found["parts"] == len(self.known)

    def _sealed(self, name: str, content: list[bytes]) -> list[bytes]:
        return [self._run.encode(), name.encode(), *content]
