"""Lets mkdocstrings see the examples in docstrings, which Google's style calls "Examples"."""

# mkdocs is in the extra "docs" alone.
# pyright: reportMissingImports=false

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Reads a section "Example:" as one of doctests, and not as a paragraph."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every function, class and attribute that is read."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
