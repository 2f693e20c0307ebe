"""The SSD's launches of a case, in a way and with tiles that a test chooses."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton

from jax_causal_conv import ssd, ssd_packed
from jax_causal_conv.kernels import record, tiles
from jax_causal_conv.kernels.record import Call
from jax_causal_conv.op import gradients
from tests.support.ssd_cases import Case


class _Traced(Exception):
    """Carries what a public op asks for."""


def call_of(case: Case) -> tuple[Any, Any, Any]:
    """The op, spec and operands that the public op makes of a case."""

    def stop(op, implementation, spec, operands):
        raise _Traced(op, spec, jax.tree.map(jnp.asarray, operands))

    function, options = (ssd_packed if case.packed else ssd), case.shape.options()
    if not case.packed:
        options["return_final_state"] = True
    with mock.patch.object(gradients, "call", stop):
        try:
            function(**case.arguments, **options)
        except _Traced as found:
            return found.args
    raise ValueError(f"a case of size zero: {case}")


def tile_of(op: str, spec: Any, operands: Any, **changes) -> Any:
    """The tiles of a call with prefills, with other fields: `chunk`, `stretch`, …"""
    shape, size = operands.x.shape, operands.B.shape[-1]
    packed = op != "ssd"
    prefills = spec.max_prefills if packed else shape[0]
    tokens = shape[0] if packed else shape[0] * shape[1]
    itemsize = max(a.dtype.itemsize for a in (operands.x, operands.B, operands.C))
    chosen = tiles.ssd_chunks(shape[-2:], size, itemsize, tokens, prefills)
    changed = dataclasses.replace(chosen, **changes)
    block = triton.next_power_of_2(max(changed.stretch * changed.chunk, 1))
    return dataclasses.replace(changed, sum_block=min(block, 1024))


def launch(case: Case, call: Call, **tile) -> tuple[np.ndarray, ...]:
    """Runs all launches of a case through `call`; y, the states, and recent tokens.

    Args:
        case: any, of sizes that are not zero.
        call: runs one launch.
        tile: changes to the tiles, where prompts may be; none are the package's own.
    """
    op, spec, operands = call_of(case)
    prompts = op.name == "ssd" or spec.max_prefills
    chosen = tile_of(op.name, spec, operands, **tile) if tile and prompts else None
    results = record.run(op.launches()(spec, operands, chosen), call)
    return tuple(map(np.asarray, results))
