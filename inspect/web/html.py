"""The HTML document of report and server, with its styles and scripts inside.

In: values, and blobs that the page reads on demand. Out: the document, piece by piece. Values and blobs stand in script
elements of type application/json with every `<` escaped, and the page makes text nodes of them. A content security
policy lets only the scripts run whose hashes it names.

Guarantees: text from the data is never read as markup (tests/test_page.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from higgs_tune.preprocess.html import for_html, policy

PAGE = Path(__file__).parent / "page"
PAGE_START = b"<!doctype html>"  # of page.html
SCRIPTS = ("dom", "source", "sound", "codes", "charts", "detail", "samples", "predictions", "run", "compare", "main")


@dataclass(frozen=True)
class Blob:
    """A value that the page reads on demand, by its id. text: JSON of `for_html`, or base64; no markup."""

    name: str
    text: str


def plotly_script() -> str:
    """plotly.js, minified, from the Python package."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def page_script() -> str:
    """The page's own scripts, in order, as one."""
    return '"use strict";\n' + "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)


def render(title: str, info: dict[str, Any], blobs: Iterable[Blob] = (), *, connect: str = "'none'") -> Iterator[str]:
    """The document, in pieces.

    Args:
        title: of the page.
        info: values that the page needs at once.
        blobs: values that it reads on demand; the iterable is consumed while the page is written.
        connect: the source that it may fetch from: `'none'`, or `'self'` for the server's page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    scripts = [plotly_script(), page_script()]
    yield from environment.get_template("page.html").generate(
        title=title,
        policy=policy(scripts, connect),
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        scripts=scripts,
        info=for_html(info),
        blobs=blobs,
    )
