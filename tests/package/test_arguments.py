"""Types of arguments say what the functions take, and help() is short."""

import inspect
import typing

import pytest

import jax_causal_conv
from jax_causal_conv import (
    arguments,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
    checks,
    ssd,
)

DECIDE = {"split", "return_final_state"}  # what a function returns
# What a layer holds itself.
LAYERS = {"activation", "dilation", "residual", "implementation"}


def by_name(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("function", "typed", "without"),
    [
        (causal_conv1d, arguments.DenseArguments, DECIDE),
        (causal_conv1d_fn, arguments.PackedArguments, DECIDE),
        (causal_conv1d_update, arguments.UpdateArguments, DECIDE),
        (ssd, arguments.SSDArguments, DECIDE),
        (causal_conv1d_fn, arguments.PackedOptions, LAYERS),
        (causal_conv1d_update, arguments.UpdateOptions, LAYERS),
    ],
)
def test_typed_arguments_are_those_of_the_function(function, typed, without):
    assert set(typed.__annotations__) == by_name(function) - without


def test_names_of_choices_are_those_that_are_accepted():
    names = typing.get_args(typing.get_args(arguments.Activation)[0])
    assert set(names) == {n for n in checks._ACTIVATIONS if isinstance(n, str)}
    names = typing.get_args(typing.get_args(arguments.Implementation)[0])
    assert {*names, None} == set(checks.IMPLEMENTATIONS)


@pytest.mark.parametrize("name", jax_causal_conv.__all__)
def test_help_names_types_instead_of_spelling_them_out(name):
    value = getattr(jax_causal_conv, name)
    if not inspect.isfunction(value):
        return
    text = str(inspect.signature(value))
    assert "ArrayLike" in text or "jax.Array" not in text
    assert "numpy.bool" not in text and len(text) < 1200, text
