"""`halo_state`: the dense op with its time axis sharded over devices."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import checks
from .promotion import promoting


@promoting
def halo_state(
    x: ArrayLike,
    axis_name: str,
    state_len: int,
    *,
    segment_ids: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
) -> jax.Array:
    """The tokens before this device's part of a sequence, for `causal_conv1d`.

    For sequence (context) parallelism: inside `jax.shard_map`, each device holds a
    contiguous part of the time axis and receives the last `state_len` tokens of its
    left neighbour: one collective-permute of them (and one of their ids), one of
    cotangents backward. Given as `initial_state`, they make the sharded op equal to the
    unsharded one, but for how a compiler rounds sums. Documents may begin and end
    anywhere, at the edge of a part too: what belongs to another run of `segment_ids`
    than this part's first token comes as zeros, whatever it holds.

    Args:
        x: `(B, T, D)`, this device's tokens; `T >= state_len`.
        axis_name: the mesh axis over which time is sharded, in order.
        state_len: tokens to receive: W-1, the filter's width less one.
        segment_ids: `(B, T)` integers as for `causal_conv1d`, or None.
        initial_state: `(B, L, D)` with `L >= state_len`, the state before the whole
            sequence, the same on all devices of the axis. None is zeros.

    Returns:
        `(B, state_len, D)` in x's dtype, promoted with that of `initial_state`.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape is wrong, or x has fewer than `state_len` tokens.

    Example:
        >>> def layer(x, ids):  # inside shard_map, specs P("batch", "time")
        ...     before = halo_state(x, "time", weight.shape[1] - 1, segment_ids=ids)
        ...     return causal_conv1d(
        ...         x, weight, initial_state=before, segment_ids=ids
        ...     )
    """
    inputs = checks.float_array("x", x, (None, None, None), "(B, T, D)")
    batch, length, _ = inputs.shape
    count = checks.static_int("state_len", state_len, minimum=0)
    if length < count:
        raise ValueError(
            f"x must have at least state_len = {count} tokens on every device, "
            f"got {length}"
        )
    if initial_state is not None:
        initial_state = checks.row_states("initial_state", initial_state, inputs, count)
    if segment_ids is not None:
        segment_ids = checks.integer_array(
            "segment_ids", segment_ids, (batch, length), "(B, T)"
        )

    def from_left(array):
        parts = jax.lax.axis_size(axis_name)
        return jax.lax.ppermute(
            array, axis_name, [(i, i + 1) for i in range(parts - 1)]
        )

    last = slice(length - count, length)
    halo = from_left(inputs[:, last])
    if segment_ids is not None:
        differs = from_left(segment_ids[:, last]) != segment_ids[:, :1]
        # A row is of the same run if all rows from it to the halo's end have its id.
        hidden = jax.lax.cummax(differs.astype(jnp.int32), axis=1, reverse=True)
        halo = jnp.where((hidden == 0)[..., None], halo, 0)
    if initial_state is not None:
        first = jax.lax.axis_index(axis_name) == 0
        rows = initial_state[:, initial_state.shape[1] - count :]
        halo = jnp.where(first, rows, halo)
    return halo
