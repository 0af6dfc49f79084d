"""Rows in files of every form that a user may have, and what is read of them."""

import bz2
import gzip
import json
import lzma

from msp_plugin.data.chats import Chat
from msp_plugin.data.sources import load_texts

ROWS = [{"text": "one", "id": 1}, {"text": "zwei\nü", "id": 2}]


def read(source, column="text"):
    """The documents of a source: texts, and messages of conversations."""
    found = []
    for document in load_texts(source, column):
        chat = isinstance(document, Chat)
        found.append(list(document.messages) if chat else "".join(document))
    return found


def write_rows(path, rows=ROWS):
    """Write rows in the form and the compression that a file's name tells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = path.name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
    table = pa.Table.from_pylist(rows) if name.endswith(("parquet", "arrow")) else None
    if name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".stream.arrow"):
        with pa.ipc.new_stream(path, table.schema) as out:
            out.write_table(table)
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    else:
        if name.endswith("array.json"):
            text = json.dumps(rows, indent=1)
        elif name.endswith((".csv", ".tsv")):
            mark = "," if name.endswith(".csv") else "\t"
            text = "".join(
                f'"{a}"{mark}{b}\n' for a, b in [("text", "id"), *((r["text"], r["id"]) for r in rows)]
            )
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(text.encode()))
    return str(path)
