"""The README's claims: its Python runs as pasted, its table of models and its links hold."""

import re
from pathlib import Path

import jax
import pytest
from flax import nnx

import revjax

ROOT = Path(revjax.__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^\| (re[sv]net\d+) \| ([\d, ]+) \| ([\d,]+)(?: / ([\d,]+))? \|", README, re.M)


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
    assert sorted(row[0] for row in ROWS) == sorted(revjax.list_models())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_table_of_models(row):
    name, units, *counts = row
    classes = (10, 100) if counts[1] else (1000,)
    for num_classes, count in zip(classes, counts, strict=False):
        model = nnx.eval_shape(lambda n=num_classes: revjax.create_model(name, n, rngs=nnx.Rngs(0)))
        parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert f"{sum(leaf.size for leaf in parameters):,}" == count
        stacked = [jax.tree.leaves(nnx.state(stage.rest, nnx.Param))[0] for stage in model.stages]
        assert ", ".join(str(1 + leaf.shape[0]) for leaf in stacked) == units


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https://|#)([^)]+)\)", README)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).is_file()] == []
