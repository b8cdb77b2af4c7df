"""Text in Markdown: names of tasks and arms may hold anything."""

from __future__ import annotations

import re
from typing import Any

_MARKUP = re.compile(r"[\\`*<>|\[\]#~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")


def markdown_cell(text: Any) -> str:
    r"""Text that Markdown shows as it is, on one line.

    >>> markdown_cell("<b>|a_b|</b>\n_c_ $x$ &lt;")  # within a word _ means nothing, and $ on some pages a formula
    '\\<b\\>\\|a_b\\|\\</b\\> \\_c\\_ \\$x\\$ \\&lt;'
    """
    return _MARKUP.sub(r"\\\g<0>", str(text)).replace("\n", " ")
