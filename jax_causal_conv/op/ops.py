"""The ops, one record each: all that jax knows of an op stands here."""

import dataclasses
import math
from collections.abc import Callable
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
    SSDBackwardOperands,
    SSDOperands,
    SSDPackedOperands,
    SSDSpec,
    UpdateOperands,
)
from ..xla import backward, forward, ssd
from .record import Op

_SSDRecords = SSDOperands | SSDBackwardOperands | SSDPackedOperands


def _kernels() -> ModuleType:
    from ..kernels import launch

    return launch


def _ssd_kernels() -> ModuleType:
    from ..kernels import launch_ssd

    return launch_ssd


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


def _rows_and_slots(spec: ConvSpec, operands: UpdateOperands) -> dict[str, str]:
    """Where slot i belongs to row i, both are sharded alike; else neither can be."""
    as_many = operands.x.shape[0] == operands.states.shape[0]
    named = operands.slots is not None or operands.write_slots is not None
    one_by_one = not named and as_many and spec.pad_slot_id == PAD_SLOT_ID
    return {"S": "B"} if one_by_one else {"S": "s", "B": "b"}


def _ssd_backward_kernels() -> ModuleType:
    from ..kernels import launch_ssd_backward

    return launch_ssd_backward


def _groups(spec: SSDSpec, operands: _SSDRecords) -> dict[str, str]:
    """Groups are sharded like their heads; a single one, which all share, is not."""
    del spec
    return {"G": "g" if operands.B.shape[-2] == 1 else "H"}


def _fold_rows(*shared: str) -> Callable[..., Any]:
    """The `fold` of an op on rows of equal length, all of which use `shared` fields.

    Mapped rows become more rows of one call, unless the shared fields are mapped too.
    """

    def fold(spec: Any, operands: Any, axes: Any, size: int) -> Any:
        del spec
        rows = operands.x.shape[axes.x : axes.x + 2]  # B, T; axes.x: is x mapped?
        if any(getattr(axes, name) for name in shared):
            return None
        # In an export with symbolic sizes it is not known whether they fit together.
        if any(map(jax.export.is_symbolic_dim, (size, *rows))):
            return None
        if not 0 < size * math.prod(rows) < 2**31:
            return None

        def fold_one(array, mapped):
            if not mapped:
                array = jnp.broadcast_to(array, (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        absent = dict.fromkeys(shared)
        folded = jax.tree.map(
            fold_one, operands._replace(**absent), axes._replace(**absent)
        )
        return folded._replace(**{name: getattr(operands, name) for name in shared})

    return fold


def _ssd_results(spec: SSDSpec, operands: SSDOperands) -> list:
    x, states = operands.x, operands.states
    if not spec.final_state:
        return [_like(x)]
    shape = (x.shape[0], *x.shape[2:], operands.B.shape[-1])
    dtype = accumulator(x) if states is None else states.dtype
    return [_like(x), jax.ShapeDtypeStruct(shape, dtype)]


def _ssd_packed_results(spec: SSDSpec, operands: SSDPackedOperands) -> list:
    del spec
    recent = operands.recent_x, operands.recent_dt, operands.recent_B
    results = operands.x, operands.states, *(recent if operands.num_drafts else ())
    return [*map(_like, results)]


def _ssd_gradients(spec: SSDSpec, operands: SSDBackwardOperands) -> list:
    """Shapes of the gradients of x, dt, A, B, C, dt_bias, D, and states if any.

    Those of A, B, C, dt_bias and D are sums, of tokens or heads, and wide.
    """
    del spec
    x, A, B, wide = operands.x, operands.A, operands.B, accumulator(operands.x)
    shapes = [
        _like(x),
        _like(operands.dt),
        jax.ShapeDtypeStruct(A.shape, wide),
        jax.ShapeDtypeStruct(B.shape, wide),
        jax.ShapeDtypeStruct(B.shape, wide),
        jax.ShapeDtypeStruct(A.shape, wide),
        jax.ShapeDtypeStruct(x.shape[2:], wide),
    ]
    if operands.states is not None:
        shapes.append(jax.ShapeDtypeStruct(operands.states.shape, wide))
    return shapes


PACKED = Op(
    name="packed",
    public="causal_conv1d_fn",
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
        write_slots="n",
        snapshot_slots="n",
        snapshot_ends="n",
    ),
    result_dims=("t Y", "s l D"),
    result_shapes=_with_states,
)

UPDATE = Op(
    name="update",
    public="causal_conv1d_update",
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
        write_slots="B",
    ),
    result_dims=("B q Y", "S l D"),
    result_shapes=_with_states,
    rename=_rows_and_slots,
)

DENSE = Op(
    name="dense",
    public="causal_conv1d",
    xla=forward.dense,
    launches=lambda: _kernels().dense,
    dims=DenseOperands(
        x="B t X", weight="D w", bias="D", states="B l D", segment_ids="B t"
    ),
    result_dims=("B t Y", "B l D"),
    result_shapes=_dense_results,
    fold=_fold_rows("weight", "bias"),
)

PACKED_BACKWARD = Op(
    name="packed_backward",
    public="causal_conv1d_fn",
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
        dsnapshots="n l D",
        snapshot_ends="n",
    ),
    result_dims=("t D", "D w", "D", "n k D"),
    result_shapes=_gradients,
)

ROWS_BACKWARD = Op(
    name="rows_backward",
    public="causal_conv1d and causal_conv1d_update",
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

SSD = Op(
    name="ssd",
    public="ssd",
    xla=ssd.dense,
    launches=lambda: _ssd_kernels().dense,
    dims=SSDOperands(
        x="B t H p",
        dt="B t H",
        A="H",
        B="B t G k",
        C="B t G k",
        D="H p",
        dt_bias="H",
        states="B H p k",
        segment_ids="B t",
    ),
    result_dims=("B t H p", "B H p k"),
    result_shapes=_ssd_results,
    rename=_groups,
    fold=_fold_rows("A", "D", "dt_bias"),
)

SSD_BACKWARD = Op(
    name="ssd_backward",
    public="ssd",
    xla=ssd.dense_backward,
    launches=lambda: _ssd_backward_kernels().backward,
    dims=SSDBackwardOperands(
        x="B t H p",
        dt="B t H",
        A="H",
        B="B t G k",
        C="B t G k",
        D="H p",
        dt_bias="H",
        states="B H p k",
        segment_ids="B t",
        dy="B t H p",
        dfinal="B H p k",
    ),
    result_dims=(
        "B t H p",
        "B t H",
        "H",
        "B t G k",
        "B t G k",
        "H",
        "H p",
        "B H p k",
    ),
    result_shapes=_ssd_gradients,
    rename=_groups,
)

SSD_PACKED = Op(
    name="ssd_packed",
    public="ssd_packed",
    xla=ssd.packed,
    launches=lambda: _ssd_kernels().packed,
    dims=SSDPackedOperands(
        x="t H p",
        dt="t H",
        A="H",
        B="t G k",
        C="t G k",
        D="H p",
        dt_bias="H",
        states="s H p k",
        query_start_loc="q",
        slots="n",
        has_initial_state="n",
        write_slots="n",
        snapshot_slots="n",
        snapshot_ends="n",
    ),
    result_dims=("t H p", "s H p k"),
    result_shapes=_ssd_packed_results,
    rename=_groups,
)

# The same with drafts: the records then have what belongs to these.
SSD_REPLAY = dataclasses.replace(
    SSD_PACKED,
    name="ssd_replay",
    public="ssd_packed",
    xla=ssd.replay,
    dims=SSD_PACKED.dims._replace(
        recent_x="s r H p", recent_dt="s r H", recent_B="s r G k", num_rejected="n"
    ),
    result_dims=(*SSD_PACKED.result_dims, "s r H p", "s r H", "s r G k"),
)

OPS = (
    PACKED,
    UPDATE,
    DENSE,
    PACKED_BACKWARD,
    ROWS_BACKWARD,
    SSD,
    SSD_BACKWARD,
    SSD_PACKED,
    SSD_REPLAY,
)
