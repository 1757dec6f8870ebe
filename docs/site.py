"""How the site is put together: the pages of docs/, and what stands elsewhere in the repository.

Called by mkdocs (mkdocs.yml), by the names of its events. Links in docs/, in the README and in
notebooks are those of the repository, so that they hold in an editor too; here they become those of
the site.
"""

# mkdocs is in the extra "docs" alone.
# pyright: reportMissingImports=false

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from notebook_pages import notebook

ROOT = Path(__file__).parent.parent
SECTIONS = {"In your library": "docs/examples/*.py", "Notebooks": "notebooks/*.ipynb"}
ADDED = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "benchmarks/results/*")
PART = re.compile(r"^<!-- README\.md: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^()#\s:]+)")


def on_config(config: Any) -> Any:
    """Fill the menu's sections of files; without any there is no section."""
    for name, pattern in SECTIONS.items():
        (section,) = [entry for entry in config.nav if name in entry]
        section[name] = [place(path) for path in found(pattern)]
        if not section[name]:
            config.nav.remove(section)
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add what lies outside docs/."""
    for path in found(*ADDED):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    for path in found(*SECTIONS.values()):
        markdown = (notebook if path.suffix == ".ipynb" else program)(ROOT / path)
        markdown = relinked(markdown, path, place(path))
        files.append(File.generated(config, place(path), content=markdown))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put in what is the README's, and let links lead to where files are on the site."""
    here = page.file.src_uri
    source = Path("docs", here) if (ROOT / "docs" / here).exists() else Path(here)
    parts = PART.split(relinked(markdown, source, here))  # text, name of a part, text, ...
    parts[1::2] = [relinked(readme_part(name), Path("README.md"), here) for name in parts[1::2]]
    return "".join(parts)


def found(*patterns: str) -> list[Path]:
    """The files' paths in the repository, in their order."""
    return [path.relative_to(ROOT) for one in patterns for path in sorted(ROOT.glob(one))]


def program(path: Path) -> str:
    """A program as a page."""
    return f"# {path.stem.replace('_', ' ')}\n\n```python\n{path.read_text()}```\n"


def place(path: Path) -> str:
    """Where a file of the repository is among those that the site is made of."""
    if path == Path("README.md"):
        return "index.md"
    if any(path.match(pattern) for pattern in SECTIONS.values()):
        path = path.with_suffix(".md")
    return path.as_posix().removeprefix("docs/")


def relinked(markdown: str, source: Path, here: str) -> str:
    """Markdown of the file `source`, with its links to files as ones of the page `here`."""

    def link(match):
        path = Path(os.path.normpath(source.parent / match[0]))
        if not (ROOT / path).is_file():  # mkdocs names what leads nowhere
            return match[0]
        return Path(os.path.relpath(place(path), os.path.dirname(here) or ".")).as_posix()

    return LINK.sub(link, markdown)


def readme_part(name: str) -> str:
    """What stands in the README between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    readme = (ROOT / "README.md").read_text()
    parts = re.findall(rf"^<!-- begin {name} -->\n(.*?)^<!-- end {name} -->$", readme, re.M | re.S)
    if len(parts) != 1:
        raise PluginError(f"README.md has {len(parts)} parts {name}: mark one, begin and end.")
    return parts[0]
