"""Argument checks of the public functions: at trace time, naming the argument.

Also where index arrays become int32: their values are clamped *before* they are
narrowed, so that a 64-bit number out of range can never wrap into somebody's slot.
"""

import operator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .columns import Columns
from .operands import PAD_SLOT_ID, ConvSpec, Implementation

IMPLEMENTATIONS = (None, "xla", "triton", "interpret")

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_INT32_MAX = 2**31 - 1


def _is_jax(value: Any) -> bool:
    return isinstance(value, jax.Array)  # tracers included


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, jax.Array)) and value.ndim > 0


def _shape(name: str, got: tuple, expected: tuple, letters: str) -> None:
    """Raises unless `got` matches `expected`, where None stands for any size."""
    fits = len(got) == len(expected) and all(
        e is None or g == e for g, e in zip(got, expected, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        sizes += "," if len(expected) == 1 else ""
        raise ValueError(f"{name} must have shape {letters} = ({sizes}), got {got}")


def float_array(
    name: str, value: Any, expected: tuple | None, letters: str
) -> jax.Array:
    """A jax array of a supported float dtype and the expected shape (None is any)."""
    if value is None:
        raise TypeError(f"{name} must be an array of shape {letters}, got None")
    if isinstance(value, (tuple, list)) and any(map(_is_array, value)):
        kind = type(value).__name__
        raise TypeError(
            f"{name} must be one array of shape {letters}, got a {kind} of {len(value)}"
        )
    array = jnp.asarray(value)
    array = lax.convert_element_type(array, array.dtype)  # drops a weak type
    if array.dtype.name not in _FLOATS:
        raise TypeError(f"{name} must be one of {_FLOATS}, got dtype {array.dtype}")
    if expected is not None:
        _shape(name, array.shape, expected, letters)
    return array


def _integers(name: str, value: Any) -> Any:
    """A jax array as it is, anything else as a NumPy array, of an integer dtype."""
    if value is None:
        raise TypeError(f"{name} must be an integer array, got None")
    array = value if _is_jax(value) else np.asarray(value)
    if not _is_jax(value) and isinstance(value, (list, tuple)) and array.size == 0:
        return array.astype(np.int32)  # an empty list has no dtype of its own
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {array.dtype}")
    return array


def integer_array(name: str, value: Any, expected: tuple, letters: str) -> jax.Array:
    """An array of integers of any dtype, as it is, of the expected shape."""
    array = _integers(name, value)
    _shape(name, array.shape, expected, letters)
    return jnp.asarray(array)


def index_array(
    name: str, value: Any, expected: tuple, letters: str, low: int, high: int
) -> Any:
    """An int32 array, clamped into `[low, high]` where narrowing could change it.

    NumPy and Python values stay on the host. int32 passes as it is: the
    implementations clamp for themselves, without an extra kernel.
    """
    array = _integers(name, value)
    _shape(name, array.shape, expected, letters)
    if jnp.iinfo(array.dtype).max <= _INT32_MAX:
        return array.astype(np.int32)
    array = array.clip(max=array.dtype.type(min(high, _INT32_MAX)))
    if jnp.issubdtype(array.dtype, jnp.signedinteger):
        array = array.clip(min=array.dtype.type(low))
    return array.astype(np.int32)


def ring_position(name: str, value: Any, batch: int, state_len: int) -> Any:
    """`cache_seqlens` as int32, reduced mod L in its own dtype where it is wider."""
    array = _integers(name, value)
    _shape(name, array.shape, (batch,), "(B,)")
    if jnp.iinfo(array.dtype).max > _INT32_MAX and state_len > 0:
        array = array % array.dtype.type(state_len)
    return array.astype(np.int32)


def segments(name: str, value: Any, expected: tuple[int, int]) -> Any:
    """Segment ids `(B, T)` as int32: which are equal to their neighbour must survive.

    Ids of a wider dtype (hashes, say) are therefore numbered, not clamped.
    """
    array = _integers(name, value)
    _shape(name, array.shape, expected, "(B, T)")
    if jnp.iinfo(array.dtype).max <= _INT32_MAX:
        return array.astype(np.int32)
    xp: Any = jnp if _is_jax(array) else np
    changes = xp.cumsum(array[:, 1:] != array[:, :-1], axis=1, dtype=np.int32)
    numbers = xp.pad(changes, ((0, 0), (1, 0)))
    return xp.where(array < 0, -1, numbers[:, : expected[1]]).astype(np.int32)


def bool_array(name: str, value: Any, expected: tuple, letters: str) -> jax.Array:
    """A bool array of the expected shape."""
    array = value if _is_jax(value) else np.asarray(value)
    if array.dtype != np.bool_:
        raise TypeError(f"{name} must have dtype bool, got {array.dtype}")
    _shape(name, array.shape, expected, letters)
    return jnp.asarray(array)


def static_int(name: str, value: Any, minimum: int | None = None) -> int:
    """A Python int (NumPy integers too), known at trace time."""
    if isinstance(value, (bool, np.bool_, jax.core.Tracer)):
        raise TypeError(f"{name} must be a static int, got {value!r}")
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a static int, got {value!r}") from None
    if minimum is not None and result < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {result}")
    return result


def offsets(query_start_loc: Any, num_tokens: int) -> Any:
    """Checked `query_start_loc` `(N+1,)`, for T tokens."""
    array = index_array(
        "query_start_loc", query_start_loc, (None,), "(N+1,)", 0, num_tokens
    )
    at_least_one_offset(array)
    return array


def has_initial_state(value: Any, num_seqs: int) -> jax.Array | None:
    """Checked `has_initial_state` `(N,)`, or None."""
    if value is None:
        return None
    return bool_array("has_initial_state", value, (num_seqs,), "(N,)")


def num_rejected_tokens(value: Any, count: int, letter: str, state_len: int) -> Any:
    """Checked `num_rejected_tokens` `(count,)`, or None."""
    if value is None:
        return None
    return index_array(
        "num_rejected_tokens", value, (count,), f"({letter},)", 0, state_len
    )


def at_least_one_offset(offsets: Any) -> None:
    """Raises where there is not even the offset 0 of an empty batch."""
    if offsets.shape[0] == 0:
        raise ValueError("query_start_loc must have shape (N+1,), got (0,)")


def _exceeds(size: Any, limit: int) -> bool:
    """Whether a size is known to be too large; `jax.export`'s symbols are trusted."""
    return not jax.export.is_symbolic_dim(size) and size > limit


def token_count(name: str, num_tokens: int, block_m: int) -> None:
    """Token numbers, and one chunk beyond, must fit in int32."""
    if _exceeds(num_tokens + block_m, _INT32_MAX):
        raise ValueError(
            f"{name} + block_m must be at most {_INT32_MAX}, "
            f"got {num_tokens} + {block_m}"
        )


def host_integers(name: str, value: Any) -> np.ndarray:
    """A 1-D NumPy integer array, for checks that look at values."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} must be concrete (call outside jit), got {value}")
    array = np.asarray(_integers(name, value))
    _shape(name, array.shape, (None,), "(N,)")
    return array


# What callers may say, and the canonical name by which implementations know it.
_ACTIVATIONS = {
    None: None,
    False: None,
    "silu": "silu",
    "swish": "silu",
    True: "silu",
    "gelu": "gelu",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def activation_name(activation: Any) -> str | None:
    """The canonical name of an activation, None for none."""
    known = activation is None or isinstance(activation, (bool, np.bool_, str))
    if known and activation in _ACTIVATIONS:
        return _ACTIVATIONS[activation]
    names = ", ".join(f'"{name}"' for name in _ACTIVATIONS if isinstance(name, str))
    cure = ""
    if isinstance(activation, jax.core.Tracer):
        cure = (
            ": it is static, so fix it with functools.partial before jax.jit, or name "
            "it in static_argnames"
        )
    raise ValueError(
        f"activation must be None, {names}, True or False, got {activation!r}{cure}"
    )


def conv_spec(
    activation: Any, columns: Columns, dilation: Any, residual: Any, weight: jax.Array
) -> ConvSpec:
    """What callers say about a conv with these filters, checked."""
    width = weight.shape[1]
    dilation = static_int("dilation", dilation, minimum=1)
    if (width - 1) * dilation > _INT32_MAX // 2:
        raise ValueError(
            f"dilation must be at most {_INT32_MAX // 2 // (width - 1)} for W = "
            f"{width}, got {dilation}"
        )
    return ConvSpec(
        activation_name(activation),
        columns,
        dilation=dilation if width > 1 else 1,
        residual=static_bool("residual", residual),
    )


def exact_products(precision: Any) -> bool:
    """None or "highest": products of float32 operands; "default": the fastest ones."""
    if precision in (None, "highest", lax.Precision.HIGHEST):
        return True
    if precision in ("default", lax.Precision.DEFAULT):
        return False
    raise ValueError(
        f'precision must be None, "highest" or "default", got {precision!r}'
    )


def limits(name: str, value: Any) -> tuple[float, float]:
    """A pair of static numbers, the least and the largest allowed."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (least, largest), got {value!r}")
    numbers = (int, float, np.integer, np.floating)
    for number in value:
        if isinstance(number, bool) or not isinstance(number, numbers):
            raise TypeError(f"{name} must be a pair of static floats, got {value!r}")
    low, high = map(float, value)
    if not low <= high:  # nor is NaN a limit
        raise ValueError(f"{name} must have least <= largest, got {value!r}")
    return low, high


def columns(
    channel_offset: Any, split: Any, x: jax.Array, weight: Any
) -> tuple[int, Columns]:
    """D, and the columns of x and parts of the output that a caller asks for.

    D is the width of x, or with `channel_offset` that of the weight.
    """
    width = x.shape[-1]
    dim, offset = width, None
    if channel_offset is not None:
        offset = static_int("channel_offset", channel_offset, minimum=0)
        dim = float_array("weight", weight, (None, None), "(D, W)").shape[0]
        if offset + dim > width:
            raise ValueError(
                f"channel_offset + D must be at most {width}, the channels of x, "
                f"got {offset} + {dim}"
            )
        if dim == width:
            offset = None
    if split is None:
        return dim, Columns(offset)
    if not isinstance(split, (tuple, list)):
        raise TypeError(f"split must be a tuple of static ints or None, got {split!r}")
    sizes = tuple(static_int("split", size, minimum=1) for size in split)
    if sum(sizes) != dim:
        raise ValueError(f"split must sum to D = {dim}, got {sizes}")
    return dim, Columns(offset, sizes)


def filters(weight: Any, bias: Any, x: jax.Array, dim: int) -> tuple[Any, Any]:
    """Checked weight `(D, W)` and bias `(D,)` or None.

    Only float64 data is worth float64 parameters; with a narrower x they become
    float32.
    """
    weight = float_array("weight", weight, (None, None), "(D, W)")
    _same_channels(x, weight, dim)
    if weight.shape[1] == 0:
        raise ValueError(
            f"weight must have shape (D, W) with W >= 1, got {weight.shape}"
        )
    if bias is not None:
        bias = float_array("bias", bias, (dim,), "(D,)")
    if x.dtype != jnp.float64:
        if weight.dtype == jnp.float64:
            weight = weight.astype(jnp.float32)
        if bias is not None and bias.dtype == jnp.float64:
            bias = bias.astype(jnp.float32)
    return weight, bias


def slots_array(
    name: str, value: Any, state: Any, state_name: str, count: int, letter: str
) -> Any:
    """Checked slot numbers `(count,)`; None needs at least `count` slots."""
    num_slots = state.shape[0]
    if value is None:
        if num_slots < count:
            raise ValueError(
                f"{state_name} must have at least {letter} = {count} slots when {name} "
                f"is None, got {num_slots}"
            )
        return None
    return index_array(name, value, (count,), f"({letter},)", -1, num_slots)


def write_slots(name: str, value: Any, count: int, letter: str, state: Any) -> Any:
    """Checked slot numbers `(count,)` to write to, or None."""
    if value is None:
        return None
    return index_array(name, value, (count,), f"({letter},)", -1, state.shape[0])


def snapshots(ends: Any, slots: Any, count: int, num_tokens: int, state: Any) -> tuple:
    """Checked `snapshot_ends` and `snapshot_indices`, `(N,)` both, or two Nones."""
    if ends is None and slots is None:
        return None, None
    for name, value in (("snapshot_ends", ends), ("snapshot_indices", slots)):
        if value is None:
            raise ValueError(
                "snapshot_ends and snapshot_indices must be given together, got None "
                f"for {name}"
            )
    ends = index_array("snapshot_ends", ends, (count,), "(N,)", 0, num_tokens)
    return ends, write_slots("snapshot_indices", slots, count, "N", state)


def state_array(name: str, value: Any, dim: int, least: int) -> jax.Array:
    """Checked conv state `(S, L, D)` with L >= `least`."""
    state = float_array(name, value, (None, None, dim), "(S, L, D)")
    _slot_length(name, state, least, "(S, L, D)", "(W-1) * dilation")
    return state


def _slot_length(
    name: str, state: jax.Array, least: int, letters: str, meaning: str
) -> None:
    """Raises where slots have fewer rows than `least`, or too many elements."""
    if state.shape[1] < least:
        raise ValueError(
            f"{name} must have shape {letters} with L >= {meaning} = {least}, "
            f"got {state.shape}"
        )
    _slot_size(name, state)


def _slot_size(name: str, state: jax.Array) -> None:
    if _exceeds(state.shape[1] * state.shape[2], _INT32_MAX):
        raise ValueError(
            f"{name} must have fewer than 2**31 elements in a slot, got {state.shape}"
        )


def row_states(
    name: str, value: Any, out: Any, least: int, meaning: str = "(W-1) * dilation"
) -> jax.Array:
    """Checked states `(B, L, D)` of the rows of `out`, with L >= `least`."""
    batch, _, dim = out.shape
    state = float_array(name, value, (batch, None, dim), "(B, L, D)")
    _slot_length(name, state, least, "(B, L, D)", meaning)
    return state


def static_bool(name: str, value: Any) -> bool:
    """A Python bool (NumPy's too), known at trace time."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def pad_slot(pad_slot_id: Any, num_slots: int) -> int:
    """The pad slot number; all those outside [0, S) mean the same: -1."""
    pad = static_int("pad_slot_id", pad_slot_id)
    return pad if 0 <= pad < num_slots else PAD_SLOT_ID


def implementation_for(implementation: Any, x: jax.Array) -> Implementation:
    """A valid `implementation`, with what x's dtype says about None."""
    known = implementation is None or isinstance(implementation, str)
    if not known or implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    if x.dtype != jnp.float64:
        return cast(Implementation, implementation)
    if implementation in ("triton", "interpret"):
        raise TypeError(
            f'x must not be float64 with implementation="{implementation}", whose '
            'kernels accumulate in float32; got float64. Use "xla" or None'
        )
    return "xla"


def _same_channels(x: jax.Array, weight: jax.Array, dim: int) -> None:
    """Raises where x and the filter have different channels, saying which to mend."""
    if weight.shape[0] == dim:
        return
    if weight.shape[1] == dim:
        raise ValueError(
            f"weight must have shape (D, W) with D = {dim}, the channels of x, got "
            f"{weight.shape}: it looks transposed"
        )
    hint = ""
    if weight.shape[0] in x.shape[:-1]:
        axis = x.shape.index(weight.shape[0])
        hint = f": its axis {axis} has as many, and channels come last here"
    raise ValueError(
        f"x must have D = {weight.shape[0]} channels in its last axis, as "
        f"weight (D, W) = {weight.shape} has, got x of shape {x.shape}{hint}"
    )
