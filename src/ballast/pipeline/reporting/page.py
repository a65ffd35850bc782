"""Pages from templates: self-contained HTML files that fetch nothing and run no script but their own.

Everything that goes into a page is escaped by Jinja; completions go in as JSON that cannot end its element. Behind that
stands the page's own content policy: it allows the one script by its hash, and no network.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ballast.pipeline.reporting.completions import Shown

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES = files("ballast.pipeline.reporting") / "templates"


def render(template: str, styles: Iterable[str], script: str | None = None, **parts: Any) -> str:
    """A page.

    Args:
        template: name of its template.
        styles: names of its style sheets.
        script: name of its script, if it has one.
        parts: what the template is given besides.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("ballast.pipeline.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    code = None if script is None else _text(script)
    return environment.get_template(template).render(
        styles=[Markup(_text(style)) for style in styles],
        script=None if code is None else Markup(code),
        script_hash=None if code is None else _sha256(code),
        **parts,
    )


def embedded_json(rows: Iterable[Shown]) -> "Markup":
    """Completions as JSON for a script element: no `<`, `>` or `&` stands in it as such."""
    from jinja2.utils import htmlsafe_json_dumps

    compact = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    return htmlsafe_json_dumps([asdict(row) for row in rows], dumps=compact)


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
