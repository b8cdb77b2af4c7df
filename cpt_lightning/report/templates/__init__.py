"""The texts of reports, filled in: everything that a run said is escaped."""

from __future__ import annotations

import re
from typing import Any

from cpt_lightning.records.markdown import markdown_cell


def render(template: str, **values: Any) -> str:
    """A template with its values: HTML and Markdown by what the template's name says."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not for `cpt --help`

    environment = Environment(
        loader=PackageLoader("cpt_lightning.report"),
        autoescape=".html" in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": markdown_cell, "fenced": fenced}
    return environment.get_template(template).render(**values)


def fenced(text: Any) -> str:
    """Text as a block of code, whose fence is longer than any within.

    >>> print(fenced("a"))
    ```text
    a
    ```
    """
    longest = max(map(len, re.findall("`+", str(text))), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
