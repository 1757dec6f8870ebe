"""The README and the pages: their Python runs as pasted, tables of models and links hold."""

import re
from pathlib import Path

import jax
import pytest
from test_models import PARAMETERS

import revjax
from revjax import models

ROOT = Path(revjax.__file__).parent.parent
README = (ROOT / "README.md").read_text()
LONG = ("faq.md", "other_tools.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRANSFORMERS = re.findall(
    r"^\| (revvit_\w+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|", README, re.M
)
ROWS = re.findall(
    r"^\| (\w*re[sv]net\d+) \| ([\d, ]+) \| ([\d,]+)(?: / ([\d,]+))? \|", README, re.M
)


def python_of(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [])
        for page in PAGES
        if python_of(page)
    ],
    ids=lambda page: page.name,
)
@jax.numpy_dtype_promotion("standard")  # as readers have it
@jax.numpy_rank_promotion("allow")
def test_python_prints_what_its_comments_say(page, capsys):
    namespace = {}  # one for all blocks: some go on from the one before
    for block in python_of(page):
        exec(compile(block, page.name, "exec"), namespace)
        due = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert due
        assert capsys.readouterr().out.splitlines() == due


def test_table_has_every_model():
    assert sorted(row[0] for row in ROWS + TRANSFORMERS) == sorted(revjax.list_models())


def test_table_of_models():
    """Against the counts that test_models holds the networks to."""
    for name, units, *counts in ROWS:
        due = [f"{count:,}" for count in PARAMETERS[name].values()]
        assert [count for count in counts if count] == due
        assert units == ", ".join(map(str, models.architecture_of(name)["units"]))


def test_table_of_transformers():
    for name, *how, count in TRANSFORMERS:
        own = models.architecture_of(name)
        assert [int(value) for value in how] == [own[key] for key in ("depth", "width", "heads")]
        assert count == f"{PARAMETERS[name][1000]:,}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    """In the repository; `make docs` holds those of the site, and anchors."""
    links = re.findall(r"\]\((?!https://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_links_are_found():
    assert len(re.findall(r"\]\((?!https://|#)([^)#]+)", README)) > 3
