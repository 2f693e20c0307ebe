"""What `ssd` and `ssd_packed` must compute: the recurrence, one token after another.

Loops in numpy, in float64 whatever the inputs. Nothing is shared with
`jax_causal_conv`. Letters as in `jax_causal_conv.mamba2.ssd`.
"""

import dataclasses
import math

import numpy as np

from tests.support.reference import (
    PAD_SLOT_ID,
    clean_offsets,
    is_slot,
    snapshot_of,
    write_slot,
)

NO_LIMIT = (0.0, math.inf)


def step_sizes(dt, bias=None, softplus=False, limit=NO_LIMIT, wide=np.float32):
    """The step sizes of the recurrence in float64; NaN stays NaN.

    Sums with the bias are taken in `wide`, the dtype of the computation.
    """
    dt = np.asarray(dt).astype(wide)
    with np.errstate(all="ignore"):
        if bias is not None:
            dt = dt + np.asarray(bias).astype(wide)
        dt = dt.astype(np.float64)
        if softplus:
            dt = np.logaddexp(dt, 0)
        if tuple(limit) != NO_LIMIT:
            dt = np.clip(dt, *limit)
    return dt


def recurrence(x, dt, A, B, C, D, state):
    """y `(n, H, P)` and the last state of one request that starts from `state`.

    dt are step sizes as they take part.
    """
    x, dt, A, B, C, state = (
        np.asarray(a).astype(np.float64) for a in (x, dt, A, B, C, state)
    )
    D = np.zeros(len(A)) if D is None else np.asarray(D).astype(np.float64)
    D = D.reshape(len(A), -1) if len(A) else np.zeros((0, 1))
    per_group = x.shape[1] // B.shape[1]
    y = np.zeros(x.shape)
    with np.errstate(all="ignore"):
        for n in range(len(x)):
            write, read = (np.repeat(a[n], per_group, axis=0) for a in (B, C))
            new = (dt[n][:, None] * x[n])[:, :, None] * write[:, None, :]
            state = np.exp(dt[n] * A)[:, None, None] * state + new
            y[n] = (state * read[:, None, :]).sum(-1) + D * x[n]
    return y, state


@dataclasses.dataclass(frozen=True)
class Served:
    """A live sequence of a packed batch that is not surplus: its tokens and slot."""

    number: int
    tokens: slice
    slot: int


def served(
    query_start_loc,
    num_tokens,
    num_slots,
    cache_indices,
    max_prefills,
    pad_slot_id,
    drafts=0,
) -> list[Served]:
    """The sequences of a packed batch that are not skipped."""
    offsets, prefills, result = clean_offsets(query_start_loc, num_tokens), 0, []
    for i in range(len(offsets) - 1):
        count = offsets[i + 1] - offsets[i]
        slot = i if cache_indices is None else int(cache_indices[i])
        if count == 0 or not is_slot(slot, num_slots, pad_slot_id):
            continue
        if count > 1 + drafts:
            prefills += 1
            if max_prefills is not None and prefills > max_prefills:
                continue
        result.append(Served(i, slice(offsets[i], offsets[i + 1]), slot))
    return result


def _wide(x):
    return np.float64 if x.dtype == np.float64 else np.float32


def kept_drafts(drafts, i, has_initial_state, num_rejected_tokens) -> int:
    """How many of its slot's recent tokens sequence i begins with."""
    if has_initial_state is None or not has_initial_state[i]:
        return 0
    if num_rejected_tokens is None:
        return drafts
    return drafts - min(max(int(num_rejected_tokens[i]), 0), drafts)


def ssd_packed(
    x,
    dt,
    A,
    B,
    C,
    D,
    ssm_states,
    query_start_loc,
    *,
    cache_indices=None,
    has_initial_state=None,
    num_rejected_tokens=None,
    write_indices=None,
    snapshot_ends=None,
    snapshot_indices=None,
    recent_x=None,
    recent_dt=None,
    recent_B=None,
    max_prefills=None,
    pad_slot_id=PAD_SLOT_ID,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=NO_LIMIT,
):
    """y and the new states, both in float64.

    With recent tokens, as in `DraftStates`, a third result: the new ones, in their
    dtypes but for step sizes, which are float64.
    """
    y, old = np.zeros(x.shape), np.asarray(ssm_states).astype(np.float64)
    states, place = old.copy(), (len(old), pad_slot_id)
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, _wide(x))
    before: tuple = ()
    if recent_x is not None:
        before = recent_x, np.asarray(recent_dt).astype(np.float64), recent_B
    drafts = before[0].shape[1] if before else 0
    recent = [rows.copy() for rows in before]
    batch = query_start_loc, len(x), len(states), cache_indices, max_prefills
    for sequence in served(*batch, pad_slot_id, drafts):
        here, slot = sequence.tokens, sequence.slot
        i, length = sequence.number, here.stop - here.start
        state = np.zeros_like(old[slot])
        if has_initial_state is not None and has_initial_state[i]:
            state = old[slot]
        kept = kept_drafts(drafts, i, has_initial_state, num_rejected_tokens)
        missing = drafts - kept
        tokens = [rows[here] for rows in (x, dt, B)]
        if before:  # those of other dtypes are rounded to the batch's
            replayed = [
                rows[slot, :kept].astype(own.dtype)
                for rows, own in zip(before, tokens, strict=True)
            ]
            tokens = [
                np.concatenate(pair) for pair in zip(replayed, tokens, strict=True)
            ]
        read = np.concatenate([np.zeros((kept, *C.shape[1:])), C[here].astype(float)])

        def after(end, tokens=tokens, read=read, state=state):
            first = slice(0, end)
            x, dt, B = (rows[first] for rows in tokens)
            return recurrence(x, dt, A, B, read[first], D, state)

        y[here] = after(None)[0][kept:]
        written = write_slot(slot, write_indices, i, *place)
        left = [] if written is None else [(written, length)]
        snapshot = snapshot_of(
            snapshot_ends, snapshot_indices, i, length, written, *place
        )
        if snapshot is not None:
            left.append(snapshot)
        for target, end in left:
            states[target] = after(max(end - missing, 0))[1]
            for new, rows in zip(recent, tokens, strict=False):
                front = np.zeros((missing, *rows.shape[1:]), rows.dtype)
                new[target] = np.concatenate([front, rows])[end : end + drafts]
    return (y, states, recent) if before else (y, states)


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    initial_state=None,
    segment_ids=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=NO_LIMIT,
):
    """y and the final states `(B, H, P, K)`, both in float64."""
    batch, length, heads, dim = x.shape
    y, finals = np.zeros(x.shape), []
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, _wide(x))
    for b in range(batch):
        ids = [0] * length if segment_ids is None else [int(i) for i in segment_ids[b]]
        state = np.zeros((heads, dim, B.shape[3]))
        if initial_state is not None:
            state = np.asarray(initial_state[b]).astype(np.float64)
        for n in range(length):
            if ids[n] < 0:
                continue
            if n > 0 and ids[n] != ids[n - 1]:
                state = np.zeros_like(state)
            one = slice(n, n + 1)
            y[b, one], state = recurrence(
                x[b, one], dt[b, one], A, B[b, one], C[b, one], D, state
            )
        finals.append(state)
    return y, np.array(finals).reshape(batch, heads, dim, B.shape[3])


def gradients(x, dt, A, B, C, D, dt_bias, state, dy, dstate, *, sizes=False):
    """Gradients of one request's y and last state, by the adjoint of `recurrence`.

    Args:
        x, dt, A, B, C, D, state: as there, but dt before bias and softplus.
        dt_bias: `(H,)`.
        dy: `(n, H, P)`, the cotangent of y.
        dstate: `(H, P, K)`, the cotangent of the last state.
        sizes: sum up the absolute values of all terms instead, those that a gradient
            is the sum of.

    Returns:
        The gradients by the names of the arguments, in float64.
    """
    x, dt, A, B, C, D, dt_bias, state, dy, dstate = (
        np.asarray(a).astype(np.float64)
        for a in (x, dt, A, B, C, D, dt_bias, state, dy, dstate)
    )
    logits, rate = dt + dt_bias, A
    dt, slope = np.logaddexp(0, logits), 1 / (1 + np.exp(-logits))
    if sizes:
        x, rate, B, C, D, state, dy, dstate = map(
            abs, (x, rate, B, C, D, state, dy, dstate)
        )
    heads, groups = x.shape[1], B.shape[1]
    write, read = (np.repeat(a, heads // groups, axis=1) for a in (B, C))
    decay, states = np.exp(dt * A), [state]
    for n in range(len(x)):
        new = np.einsum("h,hp,hk->hpk", dt[n], x[n], write[n])
        states.append(decay[n][:, None, None] * states[-1] + new)
    ddt, dx, dwrite, dread = map(np.zeros_like, (dt, x, write, read))
    dA = np.zeros_like(A)
    for n in reversed(range(len(x))):
        dread[n] = np.einsum("hp,hpk->hk", dy[n], states[n + 1])
        dstate = dstate + dy[n][:, :, None] * read[n][:, None, :]
        dnew = np.einsum("hpk,hk->hp", dstate, write[n])
        dx[n] = dt[n][:, None] * dnew + D.reshape(heads, -1) * dy[n]
        dwrite[n] = dt[n][:, None] * np.einsum("hpk,hp->hk", dstate, x[n])
        dlog = decay[n] * np.einsum("hpk,hpk->h", dstate, states[n])
        ddt[n] = rate * dlog + (dnew * x[n]).sum(-1)
        dA += dt[n] * dlog
        dstate = decay[n][:, None, None] * dstate

    def by_group(a):
        return a.reshape(len(a), groups, -1, a.shape[-1]).sum(2)

    return {
        "x": dx,
        "dt": ddt * slope,
        "A": dA,
        "B": by_group(dwrite),
        "C": by_group(dread),
        "D": (dy * x).sum((0, 2) if D.ndim == 1 else 0),
        "dt_bias": (ddt * slope).sum(0),
        "state": dstate,
    }
