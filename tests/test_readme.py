"""The README's claims: its Python runs as pasted, its table of models and its links hold."""

import re
from pathlib import Path

import jax
from test_models import PARAMETERS

import revjax
from revjax import models

ROOT = Path(revjax.__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TRANSFORMERS = re.findall(
    r"^\| (revvit_\w+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|", README, re.M
)
ROWS = re.findall(
    r"^\| (\w*re[sv]net\d+) \| ([\d, ]+) \| ([\d,]+)(?: / ([\d,]+))? \|", README, re.M
)


@jax.numpy_dtype_promotion("standard")  # as readers have it
@jax.numpy_rank_promotion("allow")
def test_python_prints_what_its_comments_say(capsys):
    namespace = {}  # one for all blocks: some go on from the one before
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
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


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https://|#)([^)]+)\)", README)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).is_file()] == []
