"""Every public function shows itself in use, and the example runs."""

import doctest
import importlib
import pkgutil

import pytest

import deq_jax
import deq_jax.solvers

MODULES = ["deq_jax"] + [
    name for _, name, _ in pkgutil.walk_packages(deq_jax.__path__, "deq_jax.") if not name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", deq_jax.__all__)
def test_every_public_object_says_what_it_is(name):
    documented = getattr(deq_jax, name)
    assert (documented.__doc__ or "").strip(), f"{name} has no docstring"
