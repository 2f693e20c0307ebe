"""What the package must compute, written per request in the most obvious way.

Loops over requests, tokens and taps, in numpy, with float64 sums. Nothing here is
shared with `jax_causal_conv`: these few lines are the definition it is tested against.

Letters: T tokens, N sequences, S slots, D channels, W filter width, L state length,
B rows, Q tokens per row, P programs. The newest input is the last row of a slot.
"""

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


def shift_in(history, tokens):
    """The last L entries of concat(history, new inputs), in the state's dtype."""
    with np.errstate(all="ignore"):
        tokens = tokens.astype(history.dtype)
    return np.concatenate([history, tokens])[len(tokens) :]


def convolve(history, tokens, weight, bias, activation):
    """float64 outputs of one request: `tokens` (n, D) after `history` (H, D), H >= W-1.

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
                row = len(history) + token - (width - 1) + tap
                total = total + operand(weight[:, tap]) * inputs[row]
            if activation in ("silu", "swish", True):
                total = total / (1 + np.exp(-total))
            out[token] = total
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
    activation="silu",
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
            history, tokens, weight, bias, activation
        )
        new_states[slot] = shift_in(history, tokens)
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
    num_rejected_tokens=None,
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
        if cache_seqlens is None:
            rejected = 0 if num_rejected_tokens is None else num_rejected_tokens[b]
            history = without_rejected(conv_state[slot], rejected)
            new_state[slot] = shift_in(history, tokens)
        else:  # a circular buffer: position c lives in row c mod L
            position = int(cache_seqlens[b])
            before = [(position - back) % length for back in range(width - 1, 0, -1)]
            history = conv_state[slot][before]
            for q in range(len(tokens) if length else 0):
                with np.errstate(all="ignore"):
                    row = tokens[q].astype(conv_state.dtype)
                new_state[slot, (position + q) % length] = row
        out[b] = convolve(history, tokens, weight, bias, activation)
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
