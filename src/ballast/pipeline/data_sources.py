"""Data sources as a configuration writes them, and the tables that they stand for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.pipeline.evaluation.named_suites import NAMED_SUITES, HubPlace, NamedSuite

SHIPPED = "shipped"
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """One data source, taken apart.

    Attributes:
        text: as it was written.
        suite: the published set whose columns it has; None for any other table.
        shipped: kinds of the shipped requests, as written; None for a table.
        place: a file, or `owner/name:split`; empty for shipped rows, and for a published set from its own place.
    """

    text: str
    suite: NamedSuite | None
    shipped: str | None
    place: str

    @property
    def name(self) -> str:
        """What the rows' ids begin with, and what the source's own figures are called."""
        if self.shipped is not None:
            return SHIPPED
        return self.suite.name if self.suite else Path(self.place).stem

    @property
    def file(self) -> Path | None:
        """The file that it names, where it names one; it need not exist."""
        path = Path(self.place).expanduser()
        return path if self.place and path.suffix in READERS else None

    @property
    def hub_name(self) -> str:
        """The data set of the hub that it names, if it is one."""
        return self.suite.hub.name if self.suite and not self.place else self.place.partition(":")[0]


def parse_source(text: str) -> Source:
    """Take a source apart: `shipped[:KINDS]`, `SUITE`, `SUITE:PLACE` or `PLACE`."""
    head, _, rest = text.partition(":")
    if head == SHIPPED:
        return Source(text, None, rest, "")
    if head in NAMED_SUITES:
        return Source(text, NAMED_SUITES[head], None, rest)
    return Source(text, None, None, text)


def read_source(source: Source) -> Any:
    """The table of a source that is not shipped.

    Raises:
        DataError: a file that is missing, empty, unreadable or of another form; a data set that the hub does not give.
    """
    import datasets

    file = source.file
    if file is not None:
        check_file(source.text, file)
        try:
            return datasets.load_dataset(READERS[file.suffix], data_files=str(file), split="train")
        except Exception as error:
            raise DataError(
                f"data file '{source.place}' cannot be read as {file.suffix[1:]} ({root_cause(error)}); mend the file"
            ) from error
    place = _hub_place(source)
    try:
        return datasets.load_dataset(place.name, place.config, split=place.split)
    except Exception as error:
        raise DataError(
            f"data set '{place.name}' cannot be loaded from the hub ({root_cause(error)}); check its name, split and your "
            "connection, or give a file"
        ) from error


def check_file(text: str, file: Path) -> None:
    """The file of a source is there and holds something.

    Args:
        text: the source as it was written.
        file: its file.

    Raises:
        DataError: it is not so.
    """
    if not file.is_file():
        raise DataError(
            f"data file '{text}' does not exist (looked in {file.absolute().parent}); check the sources in your configuration"
        )
    if file.stat().st_size == 0:
        raise DataError(f"data file '{text}' is empty; give a file with at least one row")


def _hub_place(source: Source) -> HubPlace:
    if source.suite and not source.place:
        return source.suite.hub
    name, _, split = source.place.partition(":")
    path = Path(source.place).expanduser()
    # `owner/name-1.0` is a hub id; `prompts.txt`, a folder or a longer path is not.
    file_like = path.suffix[1:].isalpha() or name.count("/") > 1 or source.place.startswith((".", "~", "/"))
    if path.exists() or file_like:
        raise DataError(
            f"data source '{source.text}' is no file of a known form; give one that ends in {', '.join(READERS)}"
        )
    published = source.suite.hub if source.suite and name == source.suite.hub.name else HubPlace(name)
    return HubPlace(name, split or published.split, published.config)


def root_cause(error: BaseException) -> str:
    """The first error of a chain, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
