"""The examples in docstrings print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import revjax

MODULES = [module.name for module in pkgutil.walk_packages(revjax.__path__, "revjax.")]


@pytest.mark.parametrize("name", MODULES)
@jax.numpy_dtype_promotion("standard")  # as readers have it
@jax.numpy_rank_promotion("allow")
def test_examples(name):
    names = {"jax": jax, "jnp": jnp, "nnx": nnx, "revjax": revjax}
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert failed == 0


def test_public_functions_are_in_examples():
    docs = [inspect.getdoc(function) or "" for _, function in inspect.getmembers(revjax, callable)]
    lines = "\n".join(docs).splitlines()
    examples = "\n".join(line for line in lines if line.strip().startswith(">>>"))
    names = [name for name, _ in inspect.getmembers(revjax, inspect.isfunction)]
    assert len(names) > 8
    assert [name for name in names if name not in examples] == []
