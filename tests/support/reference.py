"""What the package must compute, written per request in the most obvious way.

Loops over requests, tokens and taps, in numpy, with float64 sums. Nothing here is
shared with `jax_causal_conv`: these few lines are the definition it is tested against.

Letters: T tokens, N sequences, S slots, D channels, W filter width, L state length,
B rows, Q tokens per row, P programs. The newest input is the last row of a slot.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

PAD_SLOT_ID = -1


def clean_offsets(query_start_loc, num_tokens):
    """cummax(clip(query_start_loc, 0, T)): what any vector of integers means."""
    offsets, highest = [], 0
    for offset in query_start_loc:
        highest = max(highest, min(max(int(offset), 0), num_tokens))
        offsets.append(highest)
    return offsets


def is_slot(slot, num_slots, pad_slot_id=PAD_SLOT_ID):
    return slot != pad_slot_id and 0 <= slot < num_slots


def without_rejected(rows, rejected):
    """The slot (L, D) without its last r rows, right-aligned again, zeros in front."""
    length = len(rows)
    rejected = min(max(int(rejected), 0), length)
    return np.concatenate([np.zeros_like(rows[:rejected]), rows[: length - rejected]])


def write_slot(read, indices, i, num_slots, pad_slot_id):
    """The slot that sequence i, live by its slot `read`, writes; None if none."""
    slot = read if indices is None else int(indices[i])
    return slot if is_slot(slot, num_slots, pad_slot_id) else None


def snapshot_of(ends, indices, i, length, written, num_slots, pad_slot_id):
    """(slot, end) of the snapshot that sequence i leaves; None if none."""
    if indices is None or not is_slot(int(indices[i]), num_slots, pad_slot_id):
        return None
    if int(indices[i]) == written:
        return None
    return int(indices[i]), min(max(int(ends[i]), 0), length)


def shift_in(history, tokens):
    """The last L entries of concat(history, new inputs), in the state's dtype."""
    with np.errstate(all="ignore"):
        tokens = tokens.astype(history.dtype)
    return np.concatenate([history, tokens])[len(tokens) :]


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation in float64, and what error bounds need of it.

    Attributes:
        of: the activation.
        slope: its derivative.
        steepest: the largest absolute value of the derivative.
        bent: the same of the second derivative.
    """

    of: Callable
    slope: Callable
    steepest: float
    bent: float


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _gelu_slope(z):
    root = np.sqrt(2 / np.pi)
    tanh = np.tanh(root * (z + 0.044715 * z**3))
    inner = root * (1 + 3 * 0.044715 * z**2)
    slope = (1 + tanh) / 2 + z / 2 * (1 - tanh**2) * inner
    return np.where(abs(z) > 16, z > 0, slope)


ACTIVATIONS = {
    None: Activation(lambda z: z, np.ones_like, 1, 0),
    "silu": Activation(
        lambda z: z / (1 + np.exp(-z)),
        lambda z: sigmoid(z) * (1 + z * (1 - sigmoid(z))),
        1.1,
        0.5,
    ),
    "gelu": Activation(
        lambda z: z * sigmoid(np.sqrt(8 / np.pi) * (z + 0.044715 * z**3)),
        _gelu_slope,
        1.13,
        0.9,
    ),
    "relu": Activation(lambda z: np.maximum(z, 0), lambda z: 1.0 * (z > 0), 1, 0),
    "sigmoid": Activation(sigmoid, lambda z: sigmoid(z) * sigmoid(-z), 0.25, 0.1),
    "tanh": Activation(
        np.tanh, lambda z: 4 * sigmoid(2 * z) * sigmoid(-2 * z), 1, 0.78
    ),
}
ACTIVATIONS |= {False: ACTIVATIONS[None]}
ACTIVATIONS |= {True: ACTIVATIONS["silu"], "swish": ACTIVATIONS["silu"]}


def convolve(history, tokens, weight, bias, activation, dilation=1, residual=False):
    """float64 outputs of one request: `tokens` (n, D) after `history` (H, D).

    H >= (W-1) * dilation.

    Operands are first brought to the dtype of the computation, which is float32 unless
    the tokens are float64.
    """
    compute = np.float64 if tokens.dtype == np.float64 else np.float32

    def operand(array):
        return array.astype(compute).astype(np.float64)

    width = weight.shape[1]
    out = np.zeros(tokens.shape)
    with np.errstate(all="ignore"):
        inputs = np.concatenate([operand(history), operand(tokens)])
        for token in range(len(tokens)):
            total = np.zeros(tokens.shape[1]) if bias is None else operand(bias)
            for tap in range(width):
                row = len(history) + token - (width - 1 - tap) * dilation
                total = total + operand(weight[:, tap]) * inputs[row]
            out[token] = ACTIVATIONS[activation].of(total)
            if residual:
                out[token] += operand(tokens[token])
    return out


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    *,
    cache_indices=None,
    has_initial_state=None,
    num_rejected_tokens=None,
    write_indices=None,
    snapshot_ends=None,
    snapshot_indices=None,
    activation="silu",
    dilation=1,
    residual=False,
    pad_slot_id=PAD_SLOT_ID,
):
    """The packed op. Returns (float64 out before rounding, new_conv_states)."""
    offsets = clean_offsets(query_start_loc, len(x))
    out, new_states = np.zeros(x.shape), conv_states.copy()
    for i in range(len(offsets) - 1):
        tokens = x[offsets[i] : offsets[i + 1]]
        slot = i if cache_indices is None else int(cache_indices[i])
        if len(tokens) == 0 or not is_slot(slot, len(conv_states), pad_slot_id):
            continue
        history = np.zeros_like(conv_states[slot])
        if has_initial_state is not None and has_initial_state[i]:
            rejected = 0 if num_rejected_tokens is None else num_rejected_tokens[i]
            history = without_rejected(conv_states[slot], rejected)
        out[offsets[i] : offsets[i + 1]] = convolve(
            history, tokens, weight, bias, activation, dilation, residual
        )
        place = len(conv_states), pad_slot_id
        written = write_slot(slot, write_indices, i, *place)
        if written is not None:
            new_states[written] = shift_in(history, tokens)
        snapshot = snapshot_of(
            snapshot_ends, snapshot_indices, i, len(tokens), written, *place
        )
        if snapshot is not None:
            new_states[snapshot[0]] = shift_in(history, tokens[: snapshot[1]])
    return out, new_states


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    *,
    cache_seqlens=None,
    conv_state_indices=None,
    conv_state_write_indices=None,
    num_rejected_tokens=None,
    dilation=1,
    residual=False,
    pad_slot_id=PAD_SLOT_ID,
):
    """The decode op, x (B, D) or (B, Q, D). Returns (float64 out, new_conv_state)."""
    rows = x if x.ndim == 3 else x[:, None, :]
    width, length = weight.shape[1], conv_state.shape[1]
    out, new_state = np.zeros(rows.shape), conv_state.copy()
    for b in range(len(rows)):
        tokens = rows[b]
        slot = b if conv_state_indices is None else int(conv_state_indices[b])
        if len(tokens) == 0 or not is_slot(slot, len(conv_state), pad_slot_id):
            continue
        new = conv_state[slot].copy()
        if cache_seqlens is None:
            rejected = 0 if num_rejected_tokens is None else num_rejected_tokens[b]
            history = without_rejected(conv_state[slot], rejected)
            new = shift_in(history, tokens)
        else:  # a circular buffer: position c lives in row c mod L
            position = int(cache_seqlens[b])
            reach = (width - 1) * dilation
            before = [(position - back) % length for back in range(reach, 0, -1)]
            history = conv_state[slot][before]
            for q in range(len(tokens) if length else 0):
                with np.errstate(all="ignore"):
                    row = tokens[q].astype(conv_state.dtype)
                new[(position + q) % length] = row
        written = write_slot(
            slot, conv_state_write_indices, b, len(conv_state), pad_slot_id
        )
        if written is not None:
            new_state[written] = new
        out[b] = convolve(history, tokens, weight, bias, activation, dilation, residual)
    return out.reshape(x.shape), new_state


def varlen_conv_states(
    x,
    query_start_loc,
    state_len,
    *,
    conv_states=None,
    cache_indices=None,
    has_initial_state=None,
    num_rejected_tokens=None,
    ends=None,
):
    """(N, state_len, D): the slot each sequence leaves after ends[i] of its tokens."""
    offsets = clean_offsets(query_start_loc, len(x))
    dtype = x.dtype if conv_states is None else conv_states.dtype
    states = np.zeros((len(offsets) - 1, state_len, x.shape[1]), dtype)
    for i in range(len(offsets) - 1):
        tokens = x[offsets[i] : offsets[i + 1]]
        if len(tokens) == 0:
            continue
        history = states[i]
        if conv_states is not None:
            slot = i if cache_indices is None else int(cache_indices[i])
            if not is_slot(slot, len(conv_states)):
                continue
            if has_initial_state is not None and has_initial_state[i]:
                rejected = 0 if num_rejected_tokens is None else num_rejected_tokens[i]
                kept = without_rejected(conv_states[slot], rejected)
                history = np.concatenate([history, kept])[len(kept) :]
        end = len(tokens) if ends is None else min(max(int(ends[i]), 0), len(tokens))
        states[i] = shift_in(history, tokens[:end])
    return states


def build_metadata(query_start_loc, num_tokens, block_m):
    """(chunk_seq, chunk_offset): the program table, one program after the other."""
    offsets = clean_offsets(query_start_loc, num_tokens)
    programs = []
    for i in range(len(offsets) - 1):
        for block in range(-(-(offsets[i + 1] - offsets[i]) // block_m)):
            programs.append((i, block))
    spare = num_tokens // block_m + len(offsets) - len(programs)
    programs += [(PAD_SLOT_ID, number) for number in range(spare)]
    chunk_seq, chunk_offset = np.array(programs, np.int32).reshape(-1, 2).T
    return chunk_seq, chunk_offset


def runs_of(segment_ids):
    """[(first, end)] of the contiguous runs of equal ids >= 0 of one row (T,)."""
    runs, first = [], 0
    for end in range(1, len(segment_ids) + 1):
        if end == len(segment_ids) or segment_ids[end] != segment_ids[first]:
            if segment_ids[first] >= 0:
                runs.append((first, end))
            first = end
    return runs


def causal_conv1d(
    x,
    weight,
    bias=None,
    *,
    initial_state=None,
    segment_ids=None,
    activation=None,
    dilation=1,
    residual=False,
):
    """The dense op. Returns (float64 out before rounding, final_state)."""
    batch, length, dim = x.shape
    if initial_state is None:
        reach = (weight.shape[1] - 1) * dilation
        initial_state = np.zeros((batch, reach, dim), x.dtype)
    out, final_state = np.zeros(x.shape), initial_state.copy()
    for b in range(batch):
        runs = [(0, length)] if segment_ids is None else runs_of(segment_ids[b])
        for first, end in runs:
            history = initial_state[b]
            if first > 0:
                history = np.zeros_like(history)
            tokens = x[b, first:end]
            out[b, first:end] = convolve(
                history, tokens, weight, bias, activation, dilation, residual
            )
            final_state[b] = shift_in(history, tokens)  # that of the last run stays
    return out, final_state


@dataclasses.dataclass(frozen=True)
class Request:
    """Where one request's rows stand, for the gradients.

    Attributes:
        tokens: its rows of the flat x (T, D).
        history: (slot, row) of every history row, oldest first; None: a row of zeros.
        kept: what it leaves behind: for every (slot, row) that it writes, which row of
            concat(history, tokens) goes there.
    """

    tokens: list[int]
    history: list[tuple[int, int] | None]
    kept: dict[tuple[int, int], int]


def rows_left_in(slot, state_len, num_tokens):
    return {(slot, row): num_tokens + row for row in range(state_len)}


def packed_requests(
    num_tokens,
    num_slots,
    state_len,
    query_start_loc,
    *,
    cache_indices=None,
    has_initial_state=None,
    num_rejected_tokens=None,
    write_indices=None,
    snapshot_ends=None,
    snapshot_indices=None,
    pad_slot_id=PAD_SLOT_ID,
):
    offsets = clean_offsets(query_start_loc, num_tokens)
    requests = []
    for i in range(len(offsets) - 1):
        tokens = list(range(offsets[i], offsets[i + 1]))
        slot = i if cache_indices is None else int(cache_indices[i])
        if not tokens or not is_slot(slot, num_slots, pad_slot_id):
            continue
        valid = 0
        if has_initial_state is not None and has_initial_state[i]:
            rejected = 0 if num_rejected_tokens is None else num_rejected_tokens[i]
            valid = state_len - min(max(int(rejected), 0), state_len)
        history = [None] * (state_len - valid) + [(slot, row) for row in range(valid)]
        place = num_slots, pad_slot_id
        written = write_slot(slot, write_indices, i, *place)
        kept = {}
        if written is not None:
            kept = rows_left_in(written, state_len, len(tokens))
        snapshot = snapshot_of(
            snapshot_ends, snapshot_indices, i, len(tokens), written, *place
        )
        if snapshot is not None:
            kept |= rows_left_in(snapshot[0], state_len, snapshot[1])
        requests.append(Request(tokens, history, kept))
    return requests


def update_requests(
    num_rows,
    num_queries,
    num_slots,
    state_len,
    reach,
    *,
    cache_seqlens=None,
    conv_state_indices=None,
    conv_state_write_indices=None,
    num_rejected_tokens=None,
    pad_slot_id=PAD_SLOT_ID,
):
    if cache_seqlens is None:
        return packed_requests(
            num_rows * num_queries,
            num_slots,
            state_len,
            np.arange(num_rows + 1) * num_queries,
            cache_indices=conv_state_indices,
            has_initial_state=[True] * num_rows,
            num_rejected_tokens=num_rejected_tokens,
            write_indices=conv_state_write_indices,
            pad_slot_id=pad_slot_id,
        )
    requests = []
    for b in range(num_rows):
        slot = b if conv_state_indices is None else int(conv_state_indices[b])
        if not is_slot(slot, num_slots, pad_slot_id):
            continue
        tokens = list(range(b * num_queries, (b + 1) * num_queries))
        history, kept, position = [], {}, int(cache_seqlens[b])
        place = num_slots, pad_slot_id
        written = write_slot(slot, conv_state_write_indices, b, *place)
        if written not in (slot, None):  # all rows come along, in front of the history
            history = [(slot, row) for row in range(state_len)]
            kept = {(written, row): row for row in range(state_len)}
        for back in range(reach, 0, -1):
            history.append((slot, (position - back) % state_len))
        stored = written is not None and state_len
        for q in range(num_queries if stored else 0):  # the last one to a row stays
            kept[written, (position + q) % state_len] = len(history) + q
        requests.append(Request(tokens, history, kept))
    return requests


def dense_requests(batch, length, state_len, *, segment_ids=None):
    requests = []
    for b in range(batch):
        runs = [(0, length)] if segment_ids is None else runs_of(segment_ids[b])
        for first, end in runs:
            history = [(b, row) if first == 0 else None for row in range(state_len)]
            kept = {}
            if (first, end) == runs[-1]:
                kept = rows_left_in(b, state_len, end - first)
            tokens = [b * length + position for position in range(first, end)]
            requests.append(Request(tokens, history, kept))
    return requests


@dataclasses.dataclass(frozen=True)
class Measure:
    """What `gradients` adds up in the place of cotangents.

    Attributes:
        of_dz: (dy, z, Σ|terms of z|) -> (D,).
        through_residual: dy -> (D,).
    """

    of_dz: Callable
    through_residual: Callable


def gradients(
    x,
    weight,
    bias,
    states,
    requests,
    activation,
    dout,
    dstates,
    *,
    dilation=1,
    residual=False,
    measure=None,
):
    """float64 (dx, dweight, dbias, dstates) of any op, by the chain rule.

    x, dout (T, D); states, dstates (S, L, D), dstates the cotangent of the new states.
    With a `Measure` the absolute values of all factors are taken instead, and it says
    what dz is: sizes of sums, for error bounds.
    """

    def operand(array):
        array = array.astype(x.dtype if x.dtype == np.float64 else np.float32)
        return array.astype(np.float64)

    def sized(array):
        return array if measure is None else abs(array)

    width = weight.shape[1]
    taps = operand(weight)
    dx, dweight, dbias = np.zeros(x.shape), np.zeros(weight.shape), np.zeros(x.shape[1])
    dnew = sized(dstates.astype(np.float64))
    dold = dnew.copy()
    for request in requests:
        for place in request.kept:
            dold[place] = 0
    for request in requests:
        rows = [
            np.zeros(x.shape[1]) if place is None else operand(states[place])
            for place in request.history
        ] + [operand(x[token]) for token in request.tokens]
        drows = np.zeros((len(rows), x.shape[1]))
        for place, row in request.kept.items():
            drows[row] += dnew[place]
        for number, token in enumerate(request.tokens):
            own = len(request.history) + number
            met = [own - (width - 1 - tap) * dilation for tap in range(width)]
            z = np.zeros(x.shape[1]) if bias is None else operand(bias)
            terms = abs(z)
            for tap in range(width):
                z = z + taps[:, tap] * rows[met[tap]]
                terms = terms + abs(taps[:, tap] * rows[met[tap]])
            dy = dout[token].astype(np.float64)
            dz = dy * ACTIVATIONS[activation].slope(z)
            if measure is not None:
                dz = measure.of_dz(dy, z, terms)
            if residual:
                drows[own] += dy if measure is None else measure.through_residual(dy)
            dbias += dz
            for tap in range(width):
                dweight[:, tap] += dz * sized(rows[met[tap]])
                drows[met[tap]] += dz * sized(taps[:, tap])
        for place, drow in zip(request.history, drows, strict=False):
            if place is not None:
                dold[place] += drow
        for token, drow in zip(
            request.tokens, drows[len(request.history) :], strict=True
        ):
            dx[token] = drow
    return dx, dweight, None if bias is None else dbias, dold
