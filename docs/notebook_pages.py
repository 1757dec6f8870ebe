"""A notebook as a page: its text, its code and the outputs committed with it, as Markdown.

Nothing is executed. It then is a page as any other: its links are checked, the search finds it, and
it looks like the rest.
"""

import html
import json
from pathlib import Path
from typing import Any


def notebook(path: Path) -> str:
    """A notebook of format 4 as Markdown."""
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(text for cell in cells for text in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    shown = [f"```python\n{source}\n```"] if source else []
    return [*shown, *(_output(output) for output in cell["outputs"])]


def _output(output: dict[str, Any]) -> str:
    """An output in the richest of the forms it has: a picture, HTML, or text."""
    if output["output_type"] == "error":
        raise ValueError(f"a cell ended in an error, {output['ename']}: {output['evalue']}")
    data = output.get("data", {"text/plain": output.get("text", "")})
    data = {kind: "".join(value) for kind, value in data.items() if isinstance(value, str | list)}
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            return f"![output](data:{kind};base64,{data[kind].strip()})"
    if "image/svg+xml" in data or "text/html" in data:
        return f"<div>{data.get('image/svg+xml', data.get('text/html', ''))}</div>"
    return f"<pre><code>{html.escape(data['text/plain'])}</code></pre>"
