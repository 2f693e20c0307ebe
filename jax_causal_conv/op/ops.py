"""The conv's ops, one record each: all that jax knows of an op stands here."""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ..batch import accumulator
from ..operands import (
    PAD_SLOT_ID,
    ConvSpec,
    DenseOperands,
    PackedBackwardOperands,
    PackedOperands,
    RowsBackwardOperands,
    UpdateOperands,
)
from ..xla import backward, forward
from .record import Op


def _kernels() -> ModuleType:
    from ..kernels import launch

    return launch


def _like(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _parts(spec: ConvSpec, x, weight) -> list:
    """Shapes of the parts of the output."""
    sizes = spec.columns.sizes(weight.shape[0])
    return [jax.ShapeDtypeStruct((*x.shape[:-1], size), x.dtype) for size in sizes]


def _with_states(spec: ConvSpec, operands: PackedOperands | UpdateOperands) -> list:
    return [*_parts(spec, operands.x, operands.weight), _like(operands.states)]


def _dense_results(spec: ConvSpec, operands: DenseOperands) -> list:
    x, states = operands.x, operands.states
    results = _parts(spec, x, operands.weight)
    if spec.final_state_len is not None:
        shape = (x.shape[0], spec.final_state_len, operands.weight.shape[0])
        dtype = x.dtype if states is None else states.dtype
        results.append(jax.ShapeDtypeStruct(shape, dtype))
    return results


def _gradients(
    spec: ConvSpec, operands: PackedBackwardOperands | RowsBackwardOperands
) -> list:
    """Shapes of dx, dweight, dbias and dhistory."""
    del spec
    x, weight, wide = operands.x, operands.weight, accumulator(operands.x)
    return [
        jax.ShapeDtypeStruct((*x.shape[:-1], weight.shape[0]), x.dtype),
        jax.ShapeDtypeStruct(weight.shape, wide),
        jax.ShapeDtypeStruct(weight.shape[:1], wide),
        jax.ShapeDtypeStruct(operands.history.shape, wide),
    ]


def _rows_own_slots(spec: ConvSpec, operands: UpdateOperands) -> bool:
    as_many = operands.x.shape[0] == operands.states.shape[0]
    return operands.slots is None and as_many and spec.pad_slot_id == PAD_SLOT_ID


def _more_rows(
    spec: ConvSpec, operands: DenseOperands, axes: DenseOperands, size: int
) -> DenseOperands | None:
    """Dense op under vmap over anything but its filter: more rows of one batch."""
    del spec
    rows = operands.x.shape[axes.x : axes.x + 2]
    if axes.weight or axes.bias or not 0 < size * math.prod(rows) < 2**31:
        return None

    def fold(array, mapped):
        if not mapped:
            array = jnp.broadcast_to(array, (size, *array.shape))
        return array.reshape(-1, *array.shape[2:])

    filters = {"weight": operands.weight, "bias": operands.bias}
    rest = operands._replace(weight=None, bias=None)
    axes = axes._replace(weight=None, bias=None)
    return jax.tree.map(fold, rest, axes)._replace(**filters)


PACKED = Op(
    name="packed",
    xla=forward.packed,
    launches=lambda: _kernels().packed,
    dims=PackedOperands(
        x="t X",
        weight="D w",
        bias="D",
        states="s l D",
        query_start_loc="q",
        slots="n",
        has_initial_state="n",
        num_rejected="n",
        metadata=("p", "p"),
    ),
    result_dims=("t Y", "s l D"),
    result_shapes=_with_states,
)

UPDATE = Op(
    name="update",
    xla=forward.update,
    launches=lambda: _kernels().update,
    dims=UpdateOperands(
        x="B q X",
        weight="D w",
        bias="D",
        states="S l D",
        slots="B",
        cache_seqlens="B",
        num_rejected="B",
    ),
    result_dims=("B q Y", "S l D"),
    result_shapes=_with_states,
    own_rows=_rows_own_slots,
)

DENSE = Op(
    name="dense",
    xla=forward.dense,
    launches=lambda: _kernels().dense,
    dims=DenseOperands(
        x="B t X", weight="D w", bias="D", states="B l D", segment_ids="B t"
    ),
    result_dims=("B t Y", "B l D"),
    result_shapes=_dense_results,
    fold=_more_rows,
)

PACKED_BACKWARD = Op(
    name="packed_backward",
    xla=backward.packed_backward,
    launches=lambda: _kernels().packed_backward,
    dims=PackedBackwardOperands(
        x="t X",
        weight="D w",
        bias="D",
        history="n k D",
        dy="t Y",
        dslots="n l D",
        query_start_loc="q",
        live="n",
        metadata=("p", "p"),
    ),
    result_dims=("t D", "D w", "D", "n k D"),
    result_shapes=_gradients,
)

ROWS_BACKWARD = Op(
    name="rows_backward",
    xla=backward.rows_backward,
    launches=lambda: _kernels().rows_backward,
    dims=RowsBackwardOperands(
        x="B t X",
        weight="D w",
        bias="D",
        history="B k D",
        dy="B t Y",
        dslots="B l D",
        live="B",
        segment_ids="B t",
    ),
    result_dims=("B t D", "D w", "D", "B k D"),
    result_shapes=_gradients,
)

OPS = (PACKED, UPDATE, DENSE, PACKED_BACKWARD, ROWS_BACKWARD)
