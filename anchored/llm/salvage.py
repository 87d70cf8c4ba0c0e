"""What can still be read of a damaged SQLite file, row by row.

In: the file, a table and its columns. Out: the rows that SQLite gives. A page that is damaged hides its own rows, or,
where other pages hang on it, theirs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

_GIVE_UP = 5000
"""Row numbers in a row that hold nothing to be read."""


def readable_rows(path: Path, table: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """In the order in which they were written, text as bytes; raises sqlite3's error where no such table is found."""
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
        connection.text_factory = bytes
        # or a file that was cut short is refused whole
        connection.execute("pragma writable_schema = on")
        query = f"select rowid, {', '.join(columns)} from {table} where rowid >= ? order by rowid limit 1"
        connection.execute(f"select 1 from {table} limit 0")
        place = failed = 0
        while failed < _GIVE_UP:
            try:
                found = connection.execute(query, (place,)).fetchone()
            except sqlite3.DatabaseError:
                place, failed = place + 1, failed + 1
                continue
            if found is None:
                return
            yield found[1:]
            place, failed = found[0] + 1, 0
