"""Verdicts kept on disk between runs, so that a prompt judged once is never judged again.

The key is a digest of what decides a verdict: the weights, their precision, the labels, the token ids. The
engine is not part of it, since all engines agree, and the template need not be: it is in the ids.
"""

import hashlib
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from ballast.errors import GuardError
from ballast.guardrails.engines.interface import Group, Ids, Verdict, VerdictEngine
from ballast.guardrails.engines.server_state import ServerHealth
from ballast.guardrails.remote import servers_of
from ballast.models import resolve_model


class CachedEngine:
    """An engine that is asked only about prompts that the file does not hold. Unscored prompts are never kept.

    Args:
        engine: what scores the others.
        path: an SQLite file, made at first use; several processes may share it.
        identity: what decides a verdict beside the prompt's ids: weights, precision, labels.
        guard: the guard's name, for messages.

    Raises:
        GuardError: the file cannot be opened, or is no such cache.
    """

    def __init__(self, engine: VerdictEngine, path: Path, identity: Iterable[object], guard: str) -> None:
        self.name = engine.name
        self._engine, self._path, self._guard = engine, path.expanduser(), guard
        self._prefix = hashlib.sha256(repr(tuple(identity)).encode()).digest()
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, risk REAL NOT NULL, label_mass REAL) WITHOUT ROWID"
            )

    def score(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Read the verdict after each prompt; see `VerdictEngine.score`.

        Raises:
            GuardError: the file cannot be read or written.
        """
        keys = [[self._key(ids) for ids in group] for group in groups]
        known = self._read({key for row in keys for key in row})
        missing = [
            [ids for ids, key in zip(group, row, strict=True) if key not in known]
            for group, row in zip(groups, keys, strict=True)
        ]
        fresh: dict[bytes, Verdict] = {}
        if any(missing):
            for group, verdicts in zip(missing, self._engine.score(missing), strict=True):
                fresh.update(zip(map(self._key, group), verdicts, strict=True))
            self._write(fresh)
        known.update(fresh)
        return [[known[key] for key in row] for row in keys]

    def servers(self) -> tuple[ServerHealth, ...]:
        """(S,) the servers of the engine within; none where it asks none."""
        return servers_of(self._engine)

    def _key(self, ids: Ids) -> bytes:
        return hashlib.sha256(self._prefix + array("q", ids).tobytes()).digest()

    def _read(self, keys: Iterable[bytes]) -> dict[bytes, Verdict]:
        found = {}
        with self._open() as database:
            for key in keys:
                row = database.execute("SELECT risk, label_mass FROM verdicts WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = Verdict(row[0], label_mass=row[1])
        return found

    def _write(self, verdicts: dict[bytes, Verdict]) -> None:
        rows = [
            (key, verdict.risk, verdict.label_mass) for key, verdict in verdicts.items() if verdict.risk is not None
        ]
        with self._open() as database:
            database.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of this call's own, since a guard may be called from any thread; committed at the end."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=60)) as database, database:
                yield database
        except (sqlite3.Error, OSError) as error:
            raise GuardError(
                f"guardrail '{self._guard}': the cache of verdicts '{self._path}' cannot be used ({error}); "
                "move that file away, or set the engine's cache to another path"
            ) from error


def weights_identity(model: str, revision: str | None) -> tuple[object, ...]:
    """What names a model's weights: their files' names, sizes and times, and the folder that they lie in.

    Raises:
        ModelError: the model cannot be found.
    """
    folder = Path(resolve_model(model, revision)).resolve()
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json")
    return str(folder), *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
