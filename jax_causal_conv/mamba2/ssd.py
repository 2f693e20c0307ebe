"""`ssd` and `ssd_packed`: the state-space-duality op of Mamba2.

The letters of shapes are those of the conv's ops, and: H heads of P channels, G groups
of H // G heads, K state size, c tokens in a chunk.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .. import checks
from ..arguments import Implementation, SSDArguments
from ..batch import accumulator
from ..op import gradients
from ..op.ops import SSD, SSD_PACKED, SSD_REPLAY
from ..operands import (
    PAD_SLOT_ID,
    SSDOperands,
    SSDPackedOperands,
    SSDSpec,
)
from ..promotion import promoting


class DraftStates(NamedTuple):
    """SSM states from which up to q tokens can be taken back, for `ssd_packed`.

    The state in a slot is the one before the request's last q tokens; of these the
    cache remembers what the recurrence takes, oldest first, with zeros in front where
    the request had fewer. A record of zeros holds requests
    without history.

    Attributes:
        states: `(S, H, P, K)`.
        x: `(S, q, H, P)`, in the dtype of the tokens' x, so that nothing is rounded.
        dt: `(S, q, H)`, after bias, softplus and limits; float32.
        B: `(S, q, G, K)`, in the dtype of the tokens' B.
    """

    states: jax.Array
    x: jax.Array
    dt: jax.Array
    B: jax.Array


__all__ = ["ssd", "ssd_packed"]


@overload
def ssd(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    *,
    return_final_state: Literal[False] = False,
    **arguments: Unpack[SSDArguments],
) -> jax.Array: ...
@overload
def ssd(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    *,
    return_final_state: Literal[True],
    **arguments: Unpack[SSDArguments],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def ssd(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    *,
    return_final_state: bool = False,
    **arguments: Unpack[SSDArguments],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
@promoting
def ssd(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    *,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
    dt_bias: ArrayLike | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """State-space duality over B rows of T tokens, for training and plain prefill.

    Each head h of a row, with `n` a token's place and `g = h // (H // G)`, computes

        dt[n] = clip(softplus(dt[n] + dt_bias), *dt_limit)    # as far as asked for
        state = exp(dt[n] * A) * state + dt[n] * outer(x[n], B[n, g])
        y[n]  = state @ C[n, g] + D * x[n]

    by chunks of tokens (Dao and Gu 2024, arXiv 2405.21060, section 6): matrix products
    inside a chunk, and the state passed from one to the next. Products and sums are
    float32 whatever the dtypes (float64 if x is), also on GPUs with TF32, and rounded
    once. Memory is O(B·T·H·(P + chunk_size)), and one state per chunk: no state per
    token, and no score is kept for the backward pass.

    With `segment_ids` several documents are packed into a row: the state starts from
    zero with each *contiguous run* of equal ids. A negative id is padding: zero output,
    zero gradient, and it changes no state. The initial state belongs to the run at
    position 0, and to nobody if that is padding. NaN and inf in padding reach nothing;
    in a run they make the outputs of their head NaN from their token to the run's end,
    which let no gradient through, and reach no other run. (Without `segment_ids` they
    may reach tokens before theirs as well, in its chunk.)

    Differentiable in all float arguments: reverse mode, first order, by the kernels
    where they are the implementation; `implementation="xla"` in any mode and order.
    The kernels' gradients are as exact as their results, bit-identical from run to run,
    and keep one state every 256 tokens while they are computed.

    Sharded rows and heads stay local under jit, on auto and explicit mesh axes: groups
    must be sharded like the heads, or be a single one.

    Args:
        x: `(B, T, H, P)`; float32, bfloat16, float16 or float64. Dtypes may be mixed.
        dt: `(B, T, H)` step sizes, positive once bias and softplus have been applied.
        A: `(H,)`, negative.
        B: `(B, T, G, K)`, where G divides H: what heads of a group write with.
        C: `(B, T, G, K)`: what they read with.
        D: `(H,)`, `(H, P)` or None: how much of x passes by the state.
        initial_state: `(B, H, P, K)`. None is zeros.
        segment_ids: `(B, T)` integers. None is one document a row.
        chunk_size: static int c >= 1, the tokens of a chunk in XLA; the kernels choose
            their own. It changes the work and memory, not the meaning: work per token
            is O(H·(c·P + P·K)).
        return_final_state: also return the state after each row's last token that is
            not padding.
        dt_bias: `(H,)`, added to dt; None adds nothing.
        dt_softplus: static bool, whether softplus is applied to dt after the bias.
        dt_limit: static floats, the least and the largest step size, after softplus.
            The default limits nothing.
        precision: None or "highest" is exact: float32 products and sums. "default" lets
            kernels round float32 operands of matrix products (decays, states) to x's
            dtype, as mamba_ssm and vLLM always do, and XLA use the fastest products
            that the device has; sums stay float32.
        implementation: as for `causal_conv1d_fn`.

    Returns:
        `y` `(B, T, H, P)` in x's dtype. With `return_final_state` a pair of it and the
        state `(B, H, P, K)`, in the dtype of `initial_state`, else float32 (float64 if
        x is). A row of nothing but padding returns its initial state, or zeros.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape, size or option is wrong.

    Example:
        >>> y = ssd(x, dt, -jnp.exp(A_log), B, C, D, dt_bias=bias, dt_softplus=True)
    """
    inputs = checks.float_array("x", x, (None,) * 4, "(B, T, H, P)")
    rows, length, heads, dim = inputs.shape
    implementation = checks.implementation_for(implementation, inputs)
    parameters = _parameters(inputs, dt, A, B, C, D, "B, T")
    bias = _heads_or_none("dt_bias", dt_bias, heads)
    shape = (rows, heads, dim, parameters.B.shape[3])
    state, ids = None, None
    if initial_state is not None:
        state = checks.float_array(
            "initial_state", initial_state, shape, "(B, H, P, K)"
        )
    if segment_ids is not None:
        ids = checks.segments("segment_ids", segment_ids, (rows, length))
    chunk_size = checks.static_int("chunk_size", chunk_size, minimum=1)
    wanted = checks.static_bool("return_final_state", return_final_state)
    spec = SSDSpec(
        _at_most(chunk_size, length),
        dt_softplus=checks.static_bool("dt_softplus", dt_softplus),
        dt_limit=checks.limits("dt_limit", dt_limit),
        exact=checks.exact_products(precision),
        final_state=wanted,
    )
    checks.token_count("B * T", rows * length, 1)
    if 0 in inputs.shape:
        y = jnp.zeros_like(inputs)
        if state is None:
            state = jnp.zeros(shape, accumulator(inputs))
        return (y, state) if wanted else y
    operands = SSDOperands(inputs, *parameters, bias, state, ids)
    y, *final = gradients.call(SSD, implementation, spec, operands)
    return (y, final[0]) if wanted else y


@promoting
def ssd_packed(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None,
    ssm_states: ArrayLike | DraftStates,
    query_start_loc: ArrayLike,
    *,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    num_rejected_tokens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    snapshot_ends: ArrayLike | None = None,
    snapshot_indices: ArrayLike | None = None,
    max_prefills: int | None = None,
    chunk_size: int = 64,
    pad_slot_id: int = PAD_SLOT_ID,
    dt_bias: ArrayLike | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, Any]:
    """State-space duality of a packed batch, with its states updated.

    Computes what `ssd` does, for sequences packed and cached as in `causal_conv1d_fn`:
    sequence i owns tokens `[q[i], q[i+1])`, starts from the state in its slot, and
    leaves there the state after its last token. Sequences of one token take one step
    of the recurrence, longer ones go by chunks that begin at their first token; both
    may be mixed at will, and one compilation serves every batch of the same sizes.

    Skipped sequences, offsets and slots are those of `causal_conv1d_fn`: any integers
    are safe; tokens of skipped sequences and uncovered tokens come back as exact zeros;
    NaN or inf there, in unused slots, or in slots without initial state reach nothing.
    Within one sequence a NaN may also reach the tokens before it in its chunk.

    The states are functional, and updated in place where the caller donates them to
    jit or carries them through scan. Numerics are those of `ssd`; a state is rounded
    once, to its own dtype, at the end of a call. Memory beyond the arguments is
    O(T·H·(P + chunk_size)) and, in float32, a few states for each sequence and one for
    each of the `T // chunk_size + max_prefills` chunks.

    Several sequences may read one slot and write others; see `causal_conv1d_fn`.

    Differentiable in all float arguments: reverse mode, first order, by XLA whatever
    the implementation of the forward pass; `implementation="xla"` in any mode and
    order. Sharded heads stay local under jit, as in `ssd`; sharded
    tokens or slots are right but may be gathered, as in `causal_conv1d_fn`.

    Args:
        x: `(T, H, P)`; float32, bfloat16, float16 or float64. Dtypes may be mixed.
        dt: `(T, H)` step sizes, positive once bias and softplus have been applied.
        A: `(H,)`, negative.
        B: `(T, G, K)`, where G divides H.
        C: `(T, G, K)`.
        D: `(H,)`, `(H, P)` or None.
        ssm_states: `(S, H, P, K)` cache; or `DraftStates`, from which the last tokens
            of a request can be taken back. What holds for a slot's state then holds for
            all that belongs to the slot.
        query_start_loc: `(N+1,)` integers.
        cache_indices: `(N,)` integers, the slot of each sequence. None is `arange(N)`.
        has_initial_state: `(N,)` bool: does the slot hold a state, or does the sequence
            start from zero? None is all False.
        num_rejected_tokens: `(N,)` integers r, clamped into `[0, q]`: the last r tokens
            of the request were rejected drafts and are taken back. For `DraftStates`
            alone; ignored without initial state, and by skipped sequences. None is 0.
        write_indices: `(N,)` integers, the slot that each sequence's new state goes to,
        snapshot_ends: `(N,)` integers, after how many of its tokens it also leaves its
            state, and
        snapshot_indices: `(N,)` integers, the slots for that, all as for
            `causal_conv1d_fn`; a snapshot is within rounding what a call that ended
            there would have left.
        max_prefills: static int: how many live sequences may have more than one token.
            Surplus ones, in order, are skipped. With `DraftStates` those of up to 1 + q
            tokens do not count, a token and its drafts. 0 compiles a decode step,
            without any work for chunks. None is `min(N, T // 2)`: no batch has more.
        chunk_size: static int c >= 1, as for `ssd`.
        pad_slot_id: static int, the slot number that means "skip".
        dt_bias: `(H,)` or None, and
        dt_softplus: static bool, and
        dt_limit: static floats, and
        precision: of products, and
        implementation: all as for `ssd`.

    Returns:
        `y` `(T, H, P)` in x's dtype, and the new states, like `ssm_states`. Slots that
        no live sequence names are bit-for-bit unchanged. Sizes of 0 give naturally
        shaped results.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape, size or option is wrong.

    Example:
        >>> step = jax.jit(ssd_packed, donate_argnames="ssm_states",
        ...                static_argnames="max_prefills")
        >>> y, states = step(x, dt, A, B, C, D, states, query_start_loc,
        ...                  cache_indices=slots, has_initial_state=seen,
        ...                  max_prefills=4)
    """
    inputs = checks.float_array("x", x, (None,) * 3, "(T, H, P)")
    num_tokens, heads, dim = inputs.shape
    implementation = checks.implementation_for(implementation, inputs)
    parameters = _parameters(inputs, dt, A, B, C, D, "T")
    bias = _heads_or_none("dt_bias", dt_bias, heads)
    shape = (None, heads, dim, parameters.B.shape[2])
    drafts = ssm_states if isinstance(ssm_states, DraftStates) else None
    if drafts is not None:
        ssm_states = drafts.states
    states = checks.float_array("ssm_states", ssm_states, shape, "(S, H, P, K)")
    recent = () if drafts is None else _recent(drafts, states, parameters.B)
    offsets = checks.offsets(query_start_loc, num_tokens)
    num_seqs, num_slots = offsets.shape[0] - 1, states.shape[0]
    slots = checks.slots_array(
        "cache_indices", cache_indices, states, "ssm_states", num_seqs, "N"
    )
    has_initial_state = checks.has_initial_state(has_initial_state, num_seqs)
    write_slots = checks.write_slots(
        "write_indices", write_indices, num_seqs, "N", states
    )
    snapshot_ends, snapshot_slots = checks.snapshots(
        snapshot_ends, snapshot_indices, num_seqs, num_tokens, states
    )
    num_rejected = None
    if num_rejected_tokens is not None:
        if not recent:
            raise ValueError(
                "num_rejected_tokens needs ssm_states as DraftStates, which know the "
                f"last tokens, got {type(ssm_states).__name__}"
            )
        num_rejected = checks.num_rejected_tokens(
            num_rejected_tokens, num_seqs, "N", recent[0].shape[1]
        )
    most = _most_prefills(max_prefills, num_seqs, num_tokens)
    chunk_size = checks.static_int("chunk_size", chunk_size, minimum=1)
    spec = SSDSpec(
        _at_most(chunk_size, num_tokens),
        dt_softplus=checks.static_bool("dt_softplus", dt_softplus),
        dt_limit=checks.limits("dt_limit", dt_limit),
        exact=checks.exact_products(precision),
        max_prefills=most,
        pad_slot_id=checks.pad_slot(pad_slot_id, num_slots),
    )
    checks.token_count("T", num_tokens, 1)
    if 0 in inputs.shape or 0 in (num_seqs, num_slots):
        y = jnp.zeros_like(inputs)
        return y, DraftStates(states, *recent) if recent else states
    operands = SSDPackedOperands(
        inputs,
        *parameters,
        bias,
        states,
        offsets,
        slots=slots,
        has_initial_state=has_initial_state,
        write_slots=write_slots,
        snapshot_slots=snapshot_slots,
        snapshot_ends=snapshot_ends,
    )
    if recent and recent[0].shape[1]:
        checks.token_count("T + N * q", num_tokens + num_seqs * recent[0].shape[1], 1)
        operands = operands._replace(
            **dict(zip(("recent_x", "recent_dt", "recent_B"), recent, strict=True)),
            num_rejected=num_rejected,
        )
        y, *new = gradients.call(SSD_REPLAY, implementation, spec, operands)
        return y, DraftStates(*new)
    y, states = gradients.call(SSD_PACKED, implementation, spec, operands)
    return y, DraftStates(states, *recent) if recent else states


def _recent(drafts: DraftStates, states: Any, B: Any) -> tuple[Any, ...]:
    """Checked x, dt and B of `DraftStates`."""
    num_slots, heads, dim, _ = states.shape
    per_token = (heads, dim)
    x = checks.float_array(
        "ssm_states.x", drafts.x, (num_slots, None, *per_token), "(S, q, H, P)"
    )
    lead = x.shape[:2]
    dt = checks.float_array("ssm_states.dt", drafts.dt, (*lead, heads), "(S, q, H)")
    of_group = (*lead, *B.shape[1:])
    return x, dt, checks.float_array("ssm_states.B", drafts.B, of_group, "(S, q, G, K)")


def _at_most(size: int, limit: int) -> int:
    """A size >= 1 that need not be larger than `limit`, if that is known."""
    return size if jax.export.is_symbolic_dim(limit) else min(size, max(limit, 1))


def _most_prefills(wanted: int | None, num_seqs: int, num_tokens: int) -> int:
    """`max_prefills`, or less where so many do not fit."""
    if wanted is not None:
        wanted = checks.static_int("max_prefills", wanted, minimum=0)
    if any(map(jax.export.is_symbolic_dim, (num_seqs, num_tokens))):
        if wanted is None:
            raise ValueError(
                "max_prefills must be given where N or T is symbolic, got "
                f"N = {num_seqs}, T = {num_tokens}"
            )
        return wanted
    fit = min(num_seqs, num_tokens // 2)
    return fit if wanted is None else min(fit, wanted)


class _Parameters(NamedTuple):
    """Checked dt, A, B, C and D, in the order of the operands."""

    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any


def _parameters(x, dt, A, B, C, D, rows: str) -> _Parameters:
    """Checks them for x `(*rows, H, P)`, `rows` naming its leading axes."""
    lead, (heads, dim) = x.shape[:-2], x.shape[-2:]
    dt = checks.float_array("dt", dt, (*lead, heads), f"({rows}, H)")
    A = checks.float_array("A", A, (heads,), "(H,)")
    B = checks.float_array("B", B, (*lead, None, None), f"({rows}, G, K)")
    groups = B.shape[-2]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"B must have shape ({rows}, G, K) where G divides H = {heads}, "
            f"got {B.shape}"
        )
    C = checks.float_array("C", C, B.shape, f"({rows}, G, K)")
    if D is not None:
        D = checks.float_array("D", D, None, "(H,) or (H, P)")
        if D.shape not in ((heads,), (heads, dim)):
            raise ValueError(
                f"D must have shape (H,) = ({heads},) or (H, P) = ({heads}, {dim}), "
                f"got {D.shape}"
            )
    return _Parameters(dt, A, B, C, D)


def _heads_or_none(name: str, value: ArrayLike | None, heads: int) -> jax.Array | None:
    return None if value is None else checks.float_array(name, value, (heads,), "(H,)")
