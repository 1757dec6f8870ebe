"""Every public name is documented, and the examples in docstrings print what they say."""

import ast
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import revjax

ROOT = Path(revjax.__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(revjax.__path__, "revjax.")]
PUBLIC = [
    name
    for name, value in vars(revjax).items()
    if not name.startswith("_") and not inspect.ismodule(value)
]
# What the pages on the papers name implements them.
OF_A_PAPER = set(re.findall(r"\w+", (ROOT / "docs" / "papers.md").read_text())) & set(PUBLIC)


def constants(module):
    """The docstrings of a module's constants, which stand below them, by name."""
    body = ast.parse(inspect.getsource(module)).body
    for line, below in itertools.pairwise(body):
        value = below.value if isinstance(below, ast.Expr) else None
        if isinstance(line, ast.Assign) and isinstance(value, ast.Constant):
            yield ast.unparse(line.targets[0]), inspect.cleandoc(str(value.value))


def docstring(name):
    """That of a public name: a function's, a class's, or a constant's."""
    value = getattr(revjax, name)
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__doc__ and inspect.getdoc(value)
    found = [dict(constants(importlib.import_module(module))) for module in MODULES]
    return next((docs[name] for docs in found if name in docs), None)


@pytest.mark.parametrize("name", MODULES)
@jax.numpy_dtype_promotion("standard")  # as readers have it
@jax.numpy_rank_promotion("allow")
def test_examples(name):
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "nnx": nnx, "revjax": revjax}
    failed, _ = doctest.testmod(module, extraglobs=names)
    assert failed == 0
    for constant, text in constants(module):
        names = {**vars(module), **names}
        test = doctest.DocTestParser().get_doctest(text, names, constant, module.__file__, 0)
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_have_all_that_is_promised(name):
    text = docstring(name)
    assert text
    examples = [line for line in text.splitlines() if line.lstrip().startswith((">>>", "..."))]
    assert any(re.search(rf"\b{name}\b", line) for line in examples)
    if inspect.isfunction(getattr(revjax, name)) or "\nArgs:\n" in text:
        assert re.search(r"\b[Rr]aises?\b", text), "it does not say what it raises"
    if name in OF_A_PAPER:
        assert re.search(r" et al\. 20\d\d", text), "it does not say which paper it is of"


def test_public_names_are_in_the_pages():
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
    shown = re.findall(r"^::: revjax\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(shown) == sorted(PUBLIC)
