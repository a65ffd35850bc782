"""The record of decisions: one JSON object a line, without the text unless it is asked for."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ballast.errors import ConfigError
from ballast.pipeline.config_serve import ServeAudit

_log = logging.getLogger(__name__)


class AuditLog:
    """Appends decisions to a file.

    Args:
        options: where to, and whether with text.

    Attributes:
        lost: lines that could not be written, since the disk was full for example.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, options: ServeAudit) -> None:
        self.text, self.lost = options.text, 0
        self._file: TextIO | None = None
        if options.path is None:
            return
        path = Path(options.path).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"serve.audit.path = '{path}' cannot be written ({error.strerror or type(error).__name__}); name a file in a folder that "
                "the gateway may write to"
            ) from error

    def write(self, event: str, text: str | None = None, **fields: Any) -> None:
        """Append one decision; `text` is left out unless the settings ask for it."""
        if self._file is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        if self.text and text is not None:
            line["text"] = text
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:  # ValueError: closed already, by a shutdown that would not wait
            self.lost += 1
            _log.error("the audit log lost a line (%s); %d lost so far", type(error).__name__, self.lost)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
