"""Hooks of `make docs`."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Drop Sphinx's role prefixes from docstrings: ``:class:`Name` `` becomes ``Name``."""
    return re.sub(r":(?:class|func|meth|mod|attr|data):(<code>)~?", r"\1", html)
