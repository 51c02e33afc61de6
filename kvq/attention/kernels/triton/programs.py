"""The programs that run on the GPU: split-KV decoding over packed chunks, in Triton.

A program takes queries of one key-value head to one run of tokens and leaves what an online softmax needs of it;
`combine` merges the runs. Codes are read byte by byte and unpacked in registers; scales are folded into the small
operand where a scale belongs to one channel or one token, and applied to the codes in registers otherwise. Sums are in
fp32. Nothing here knows torch: addresses come in tables, see `chunk_table.py`.

Only imported where a kernel is built or run, since triton is optional.
"""

import triton
import triton.language as tl

PER_CHANNEL = tl.constexpr(0)
PER_TOKEN = tl.constexpr(1)
GROUPED = tl.constexpr(2)
"""How scales lie: one for each channel of a block, one for each token, several for each token."""

TABLE_COLUMNS = tl.constexpr(9)
"""Of the table of blocks: three planes, scale, mid, exponent or units, token factors, capacity of the chunk in blocks, rows."""
FACTOR_STEPS = tl.constexpr(32)
ZERO_SCALE = tl.constexpr(255)
LOST_MID = tl.constexpr(-128)
"""As in `PackedFormat`."""
LOG2E = tl.constexpr(1.4426950408889634)
PARTS = tl.constexpr(16)
"""Runs of tokens that are merged at a time."""
EXACT_TILE = tl.constexpr(64)
"""Tokens in full precision that one program attends to."""


@triton.jit
def _locate(table, BLOCKS: tl.constexpr, tile, batch_row, head, heads):
    """Return the table rows of a tile's blocks, and the distance of the pair's blocks in their parts.

    Both are int64 [BLOCKS], and scalars where a tile is one block.
    """
    if BLOCKS == 1:
        row = table + tile * TABLE_COLUMNS
    else:
        row = table + (tile * BLOCKS + tl.arange(0, BLOCKS)) * TABLE_COLUMNS
    rows = tl.load(row + 8)
    chunk_row = tl.load(rows.to(tl.pointer_type(tl.int64)) + batch_row, mask=rows != 0, other=batch_row)
    return row, (chunk_row * heads + head) * tl.load(row + 7)


@triton.jit
def _spread(of_block, BLOCKS: tl.constexpr):
    """Return a number of each block in a form that meets [BLOCKS, ..., ...]."""
    if BLOCKS == 1:
        return of_block
    else:
        return of_block[:, None, None]


@triton.jit
def _bytes(row, offset, place, PLANE: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, exists):
    """Return the bytes of a plane at places within its blocks, of `SIZE` bytes, uint8 [BLOCKS, ..., ...]."""
    start = (tl.load(row + PLANE) + offset * SIZE).to(tl.pointer_type(tl.uint8))
    if SIZE % 16 == 0:
        start = tl.multiple_of(start, 16)
    if exists is None:
        return tl.load(_spread(start, BLOCKS) + place)
    else:
        return tl.load(_spread(start, BLOCKS) + place, mask=exists, other=0)


@triton.jit
def _unpack(packed, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Return the codes of each byte along a new last axis, uint8 [..., 8 // WIDTH]; the lowest bits come first."""
    if WIDTH == 8:
        return tl.expand_dims(packed, 3)
    elif WIDTH == 4:
        if SPLIT == "":
            return tl.join(packed & 15, packed >> 4)
        else:
            low, high = tl.inline_asm_elementwise(SPLIT, "=&r,=&r,r", [packed], (tl.uint8, tl.uint8), True, 4)
            return tl.join(low, high)
    elif WIDTH == 2:
        if SPLIT == "":
            return _join(packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6)
        else:
            first, second, third, fourth = tl.inline_asm_elementwise(
                SPLIT, "=&r,=&r,=&r,=&r,r", [packed], (tl.uint8, tl.uint8, tl.uint8, tl.uint8), True, 4
            )
            return _join(first, second, third, fourth)
    else:
        tl.static_assert(WIDTH == 1)
        shifts = tl.arange(0, 8)[None, None, None, :].to(tl.uint8)
        return (tl.expand_dims(packed, 3) >> shifts) & 1


@triton.jit
def _open_bfloat16(packed, WIDTH: tl.constexpr, OPEN: tl.constexpr):
    """Return the centred codes of each byte along a new last axis, bfloat16 [..., 8 // WIDTH]."""
    if WIDTH == 4:
        low, high = tl.inline_asm_elementwise(OPEN, "=&r,=&r,=&r,=&r,r", [packed], (tl.bfloat16, tl.bfloat16), True, 4)
        return tl.join(low, high)
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            OPEN, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 4,
        )  # fmt: skip
        return _join(first, second, third, fourth)


@triton.jit
def _open_float16(packed, WIDTH: tl.constexpr, OPEN: tl.constexpr):
    """Return the centred codes of each byte along a new last axis, float16 [..., 8 // WIDTH]."""
    if WIDTH == 4:
        low, high = tl.inline_asm_elementwise(OPEN, "=&r,=&r,=&r,=&r,r", [packed], (tl.float16, tl.float16), True, 4)
        return tl.join(low, high)
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            OPEN, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed],
            (tl.float16, tl.float16, tl.float16, tl.float16), True, 4,
        )  # fmt: skip
        return _join(first, second, third, fourth)


@triton.jit
def _codes(packed, WIDTH: tl.constexpr, SPLIT: tl.constexpr, OPEN: tl.constexpr, DOT: tl.constexpr):
    """Return the codes of each byte along a new last axis: centred, in a dtype of products, where `OPEN` is given."""
    if OPEN == "":
        return _unpack(packed, WIDTH, SPLIT)
    elif DOT == tl.bfloat16:
        return _open_bfloat16(packed, WIDTH, OPEN)
    else:
        return _open_float16(packed, WIDTH, OPEN)


@triton.jit
def _join(first, second, third, fourth):
    """Return four tensors along a new last axis."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, (first.shape[0], first.shape[1], first.shape[2], 4))


@triton.jit
def _meant(codes, levels, LEVELS: tl.constexpr, BITS: tl.constexpr, WIDEN: tl.constexpr, DOT: tl.constexpr):
    """Return what uint8 codes stand for, in the dtype of products: a number of the codebook, or themselves, centred."""
    if LEVELS:
        return tl.load(levels + codes.to(tl.int32)).to(DOT)
    elif WIDEN == "":
        return (codes.to(tl.int32) - 2 ** (BITS - 1)).to(DOT)
    elif DOT == tl.bfloat16:
        return tl.inline_asm_elementwise(WIDEN, "=&r,=&r,r", [codes], tl.bfloat16, True, 4)
    else:
        return tl.inline_asm_elementwise(WIDEN, "=&r,=&r,r", [codes], tl.float16, True, 4)


@triton.jit
def _key_plane(
    row, offset, PLANE: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, OPEN: tl.constexpr,
    DOT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return one plane of the codes of keys, [BLOCKS * LENGTH, PADDED], as `_codes` does."""
    PER: tl.constexpr = LENGTH * WIDTH // 8
    channel = tl.arange(0, PADDED)[None, None, :]
    place = channel * PER + tl.arange(0, PER)[None, :, None]
    packed = _bytes(row, offset, place, PLANE, DIM * PER, BLOCKS, None if DIM == PADDED else channel < DIM)
    return tl.reshape(tl.permute(_codes(packed, WIDTH, SPLIT, OPEN, DOT), (0, 3, 1, 2)), (BLOCKS * LENGTH, PADDED))


@triton.jit
def _value_plane(
    row, offset, first, PLANE: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, OPEN: tl.constexpr,
    DOT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return one plane of the codes of values, channels from `first` on, [PADDED, BLOCKS * LENGTH], as `_codes` does."""
    PER: tl.constexpr = LENGTH * WIDTH // 8
    channel = first + tl.arange(0, PADDED)[None, None, :]
    place = tl.arange(0, PER)[None, :, None] * DIM + channel
    packed = _bytes(row, offset, place, PLANE, DIM * PER, BLOCKS, None if DIM % PADDED == 0 else channel < DIM)
    return tl.reshape(tl.permute(_codes(packed, WIDTH, SPLIT, OPEN, DOT), (2, 0, 3, 1)), (PADDED, BLOCKS * LENGTH))


@triton.jit
def _key_codes(
    row, offset, levels, LEVELS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    S2: tl.constexpr, OPEN: tl.constexpr, WIDEN: tl.constexpr, DOT: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return what the codes of keys stand for, [BLOCKS * LENGTH, PADDED]."""
    codes = _key_plane(row, offset, 0, W0, S0, OPEN, DOT, DIM, PADDED, LENGTH, BLOCKS)
    if W1 > 0:
        codes |= _key_plane(row, offset, 1, W1, S1, "", DOT, DIM, PADDED, LENGTH, BLOCKS) << W0
    if W2 > 0:
        codes |= _key_plane(row, offset, 2, W2, S2, "", DOT, DIM, PADDED, LENGTH, BLOCKS) << (W0 + W1)
    return codes if OPEN != "" else _meant(codes, levels, LEVELS, W0 + W1 + W2, WIDEN, DOT)


@triton.jit
def _value_codes(
    row, offset, first, levels, LEVELS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    S2: tl.constexpr, OPEN: tl.constexpr, WIDEN: tl.constexpr, DOT: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return what the codes of values stand for, channels from `first` on, [PADDED, BLOCKS * LENGTH]."""
    codes = _value_plane(row, offset, first, 0, W0, S0, OPEN, DOT, DIM, PADDED, LENGTH, BLOCKS)
    if W1 > 0:
        codes |= _value_plane(row, offset, first, 1, W1, S1, "", DOT, DIM, PADDED, LENGTH, BLOCKS) << W0
    if W2 > 0:
        codes |= _value_plane(row, offset, first, 2, W2, S2, "", DOT, DIM, PADDED, LENGTH, BLOCKS) << (W0 + W1)
    return codes if OPEN != "" else _meant(codes, levels, LEVELS, W0 + W1 + W2, WIDEN, DOT)


@triton.jit
def _metadata(row, offset, place, COLUMN: tl.constexpr, DTYPE: tl.constexpr, SHIFTED: tl.constexpr,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, exists,
):  # fmt: skip
    """Return scales or mids at places within their blocks, which hold `SIZE` of them, fp32 [BLOCKS, ..., ...].

    Zeros where there is no such part, which the dtype int1 says.
    """
    if DTYPE == tl.int1:
        return (_spread(offset, BLOCKS) + place).to(tl.float32) * 0.0
    start = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE)) + offset * SIZE
    if exists is None:
        stored = tl.load(_spread(start, BLOCKS) + place)
    else:
        stored = tl.load(_spread(start, BLOCKS) + place, mask=exists, other=0)
    metadata = stored.to(tl.float32)
    if DTYPE == tl.uint8:
        units = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)) + offset * 2)
        factor = tl.exp2(metadata * (-1.0 / FACTOR_STEPS)) * _spread(units, BLOCKS)
        metadata = tl.where(stored == ZERO_SCALE, 0.0, factor)
    elif DTYPE == tl.int8:
        units = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32)) + offset * 2 + 1)
        metadata = tl.where(stored == LOST_MID, float("nan"), metadata * _spread(units, BLOCKS))
    elif SHIFTED:
        exponent = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.int8)) + offset)
        metadata *= _spread(tl.exp2(exponent.to(tl.float32)), BLOCKS)
    return metadata


@triton.jit
def _channel_metadata(
    row, offset, COLUMN: tl.constexpr, DTYPE: tl.constexpr, SHIFTED: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Return scale or mid of each channel of one block, fp32 [PADDED]."""
    channel = tl.arange(0, PADDED)
    return _metadata(row, offset, channel, COLUMN, DTYPE, SHIFTED, DIM, 1, None if DIM == PADDED else channel < DIM)


@triton.jit
def _token_metadata(
    row, offset, group, COLUMN: tl.constexpr, DTYPE: tl.constexpr, SHIFTED: tl.constexpr, GROUPS: tl.constexpr,
    LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return scale or mid of one group of each token, fp32 [BLOCKS * LENGTH]."""
    place = tl.arange(0, LENGTH)[None, :, None] * GROUPS + group
    metadata = _metadata(row, offset, place, COLUMN, DTYPE, SHIFTED, LENGTH * GROUPS, BLOCKS, None)
    return tl.reshape(metadata, (BLOCKS * LENGTH,))


@triton.jit
def _group_metadata(
    row, offset, COLUMN: tl.constexpr, DTYPE: tl.constexpr, SHIFTED: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, GROUP: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return scale or mid of each element, where a token has several, fp32 [BLOCKS * LENGTH, PADDED]."""
    GROUPS: tl.constexpr = (DIM + GROUP - 1) // GROUP
    channel = tl.arange(0, PADDED)[None, None, :]
    place = tl.arange(0, LENGTH)[None, :, None] * GROUPS + channel // GROUP
    exists = (channel < DIM) & (place >= 0)
    metadata = _metadata(row, offset, place, COLUMN, DTYPE, SHIFTED, LENGTH * GROUPS, BLOCKS, exists)
    return tl.reshape(metadata, (BLOCKS * LENGTH, PADDED))


@triton.jit
def _token_factors(row, offset, LENGTH: tl.constexpr):
    """Return what each token of one block is to be multiplied by, fp32 [LENGTH, 1]."""
    start = tl.load(row + 6).to(tl.pointer_type(tl.uint8)) + offset * LENGTH
    codes = tl.load(start + tl.arange(0, LENGTH)).to(tl.float32)
    return tl.exp2(codes * (-1.0 / FACTOR_STEPS))[:, None]


@triton.jit
def _divisor(scale, DOT: tl.constexpr):
    """Return what scales are divided by before they meet a dtype that ends at 65,504; one if all are 0."""
    if DOT == tl.float16:
        largest = tl.max(scale, axis=0)
        return tl.where(largest > 0, largest, 1.0)
    else:
        return 1.0


@triton.jit
def _visible(scores, position, mask, mask_row, line, QUERIES: tl.constexpr, stride, HAS_MASK: tl.constexpr):
    """Return scores without the tokens that the mask hides."""
    if HAS_MASK:
        query = line % QUERIES
        seen = tl.load(
            mask + mask_row + query[None, :] * stride + position[:, None], mask=(position >= 0)[:, None], other=0
        )
        return tl.where(seen != 0, scores, float("-inf"))
    else:
        return scores


@triton.jit
def _logits(products, scaling, softcap, SOFTCAP: tl.constexpr):
    """Return logits to the base 2."""
    logits = products * scaling
    if SOFTCAP:
        grown = tl.exp2(logits / softcap * (2 * LOG2E))
        logits = softcap * (1 - 2 / (grown + 1))
    return logits * LOG2E


@triton.jit
def _weigh(logits, peak, total):
    """Return weights, the factor of the earlier sums, the new peak, and the sums of weights by place in a tile."""
    new_peak = tl.maximum(peak, tl.max(logits, axis=0))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits - safe[None, :])
    factor = tl.exp2(peak - safe)
    return weights, factor, new_peak, total * factor[None, :] + weights


@triton.jit
def _with_values(
    output, shift, weights, factor, row, offset, group, levels, LEVELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr,
    LENGTH: tl.constexpr, BLOCKS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, W0: tl.constexpr,
    W1: tl.constexpr, W2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, OPEN: tl.constexpr, WIDEN: tl.constexpr,
    SCALE: tl.constexpr, MID: tl.constexpr, SHIFTED: tl.constexpr, MID_SHIFTED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the sums of a group's channels with those of a tile added.

    They are two: `output` [WIDTH, ROWS], and `shift` [TILE, ROWS], by place in a tile, which all channels share.
    """
    output *= factor[None, :]
    codes = _value_codes(
        row, offset, group * WIDTH, levels, LEVELS, W0, W1, W2, S0, S1, S2, OPEN, WIDEN, tl.float32 if MODE == GROUPED else DOT, DIM, WIDTH,
        LENGTH, BLOCKS,
    )  # fmt: skip
    if MODE == PER_CHANNEL:
        scale = _channel_metadata(row, offset, 3, SCALE, SHIFTED, DIM, WIDTH)
        mid = _channel_metadata(row, offset, 4, MID, MID_SHIFTED, DIM, WIDTH)
        output += tl.dot(codes, weights.to(DOT), input_precision=PRECISION) * scale[:, None]
        output += mid[:, None] * tl.sum(weights, axis=0)[None, :]
    elif MODE == PER_TOKEN:
        scale = _token_metadata(row, offset, group, 3, SCALE, SHIFTED, GROUPS, LENGTH, BLOCKS)
        mid = _token_metadata(row, offset, group, 4, MID, MID_SHIFTED, GROUPS, LENGTH, BLOCKS)
        divisor = _divisor(scale, DOT)
        folded = (weights * (scale / divisor)[:, None]).to(DOT)
        if DOT == tl.float16:
            output += tl.dot(codes, folded, input_precision=PRECISION) * divisor
        else:
            output = tl.dot(codes, folded, output, input_precision=PRECISION)
        shift = shift * factor[None, :] + weights * mid[:, None]
    else:
        scale = _group_metadata(row, offset, 3, SCALE, SHIFTED, DIM, WIDTH, GROUP, LENGTH, BLOCKS)
        mid = _group_metadata(row, offset, 4, MID, MID_SHIFTED, DIM, WIDTH, GROUP, LENGTH, BLOCKS)
        states = (codes * tl.trans(scale) + tl.trans(mid)).to(DOT)
        output = tl.dot(states, weights.to(DOT), output, input_precision=PRECISION)
    return output, shift


@triton.jit
def _queries(query, place, exists, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Return query vectors, [PADDED, ROWS], in their dtype."""
    channel = tl.arange(0, PADDED)
    return tl.load(
        query + place[None, :] * DIM + channel[:, None], mask=exists[None, :] & (channel < DIM)[:, None], other=0.0
    )


@triton.jit
def _with_exact_values(
    output, weights, value_at, exists, group, WIDTH: tl.constexpr, DIM: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return sums of values, fp32 [WIDTH, ROWS], with those of tokens in full precision added."""
    channel = group * WIDTH + tl.arange(0, WIDTH)
    values = tl.load(value_at + channel[:, None], mask=exists[None, :] & (channel < DIM)[:, None], other=0.0)
    return tl.dot(values.to(DOT), weights.to(DOT), output, input_precision=PRECISION)


@triton.jit
def _store_output(outputs, output, place, line, rows, group, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Write sums of values of one range of channels."""
    channel = group * WIDTH + tl.arange(0, WIDTH)
    mask = (line < rows)[None, :] & (channel < DIM)[:, None]
    tl.store(outputs + place[None, :] * DIM + channel[:, None], output, mask=mask)


@triton.jit
def attend_parts(
    query, exact_query, key_table, value_table, key_levels, value_levels, stored_length, window_key, window_value, new_key, new_value, sink_key,
    sink_value, starts, mask, peaks, totals, outputs, scaling, softcap, heads, rows, splits, parts, tiles_per_split,
    window_length, new_length, mask_batch_stride, mask_query_stride,
    wk_batch, wk_head, wk_token, wv_batch, wv_head, wv_token, nk_batch, nk_head, nk_token, nv_batch, nv_head, nv_token,
    KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr, EXACT_DIM: tl.constexpr, EXACT_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, KEY_LENGTH: tl.constexpr,
    VALUE_LENGTH: tl.constexpr, KEY_MODE: tl.constexpr, VALUE_MODE: tl.constexpr, KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_SPLIT: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, KS0: tl.constexpr, KS1: tl.constexpr, KS2: tl.constexpr,
    VS0: tl.constexpr, VS1: tl.constexpr, VS2: tl.constexpr, KEY_OPEN: tl.constexpr, VALUE_OPEN: tl.constexpr, KEY_WIDEN: tl.constexpr, VALUE_WIDEN: tl.constexpr,
    KEY_SCALE: tl.constexpr, KEY_MID: tl.constexpr, KEY_SHIFTED: tl.constexpr, KEY_MID_SHIFTED: tl.constexpr,
    VALUE_SCALE: tl.constexpr, VALUE_MID: tl.constexpr, VALUE_SHIFTED: tl.constexpr, VALUE_MID_SHIFTED: tl.constexpr,
    KEY_FACTOR: tl.constexpr, VALUE_FACTOR: tl.constexpr,
    SINKS: tl.constexpr, HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, WINDOW_TILES: tl.constexpr,
):  # fmt: skip
    """Attend to one run of tokens: program (b * H + h, part, range of ROWS query vectors).

    Parts are splits of the store, then exact tokens. `key_levels` and `value_levels` are codebooks where KL and VL say so.

    `window_length` is a number, or, where WINDOW_TILES are the parts of the window, a pointer to it: the launch is then
    the same for every length. `query` has KEY_DIM elements, as many as the store has channels, and `exact_query` EXACT_DIM.

    Writes peak and sum of the weights and the weighted sum of the values, `[B * H, parts, rows]` and `[..., VALUE_DIM]`.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    batch_row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    line = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    WIDTH: tl.constexpr = VALUE_PADDED // VALUE_SPLIT
    stored = tl.load(stored_length)
    mask_row = batch_row * mask_batch_stride
    first_sink = tl.load(starts + batch_row) if SINKS > 0 else stored
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    output = tl.zeros((WIDTH, ROWS), tl.float32)
    if VALUE_SPLIT > 1:
        output1 = tl.zeros((WIDTH, ROWS), tl.float32)
    if VALUE_SPLIT > 2:
        output2 = tl.zeros((WIDTH, ROWS), tl.float32)
        output3 = tl.zeros((WIDTH, ROWS), tl.float32)
    if part < splits:
        total_by_place = tl.zeros((TILE, ROWS), tl.float32)
        shift = tl.zeros((TILE, ROWS), tl.float32)
        if VALUE_SPLIT > 1:
            shift1 = tl.zeros((TILE, ROWS), tl.float32)
        if VALUE_SPLIT > 2:
            shift2 = tl.zeros((TILE, ROWS), tl.float32)
            shift3 = tl.zeros((TILE, ROWS), tl.float32)
        prepared = _queries(query, pair * rows + line, line < rows, KEY_DIM, KEY_PADDED).to(tl.float32)
        first = part * tiles_per_split
        last = tl.minimum(first + tiles_per_split, stored // TILE)
        for tile in range(first, last):
            row, offset = _locate(key_table, TILE // KEY_LENGTH, tile, batch_row, head, heads)
            codes = _key_codes(
                row, offset, key_levels, KL, K0, K1, K2, KS0, KS1, KS2, KEY_OPEN, KEY_WIDEN, tl.float32 if KEY_MODE == GROUPED else DOT, KEY_DIM,
                KEY_PADDED, KEY_LENGTH, TILE // KEY_LENGTH,
            )  # fmt: skip
            if KEY_MODE == PER_CHANNEL:
                scale = _channel_metadata(row, offset, 3, KEY_SCALE, KEY_SHIFTED, KEY_DIM, KEY_PADDED)
                mid = _channel_metadata(row, offset, 4, KEY_MID, KEY_MID_SHIFTED, KEY_DIM, KEY_PADDED)
                divisor = _divisor(scale, DOT)
                folded = (prepared * (scale / divisor)[:, None]).to(DOT)
                products = tl.dot(codes, folded, input_precision=PRECISION) * divisor
                products += tl.sum(prepared * mid[:, None], axis=0)[None, :]
            elif KEY_MODE == PER_TOKEN:
                scale = _token_metadata(row, offset, 0, 3, KEY_SCALE, KEY_SHIFTED, 1, KEY_LENGTH, TILE // KEY_LENGTH)
                mid = _token_metadata(row, offset, 0, 4, KEY_MID, KEY_MID_SHIFTED, 1, KEY_LENGTH, TILE // KEY_LENGTH)
                products = tl.dot(codes, prepared.to(DOT), input_precision=PRECISION) * scale[:, None]
                products += mid[:, None] * tl.sum(prepared, axis=0)[None, :]
            else:
                scale = _group_metadata(
                    row, offset, 3, KEY_SCALE, KEY_SHIFTED, KEY_DIM, KEY_PADDED, KEY_GROUP, KEY_LENGTH,
                    TILE // KEY_LENGTH,
                )  # fmt: skip
                mid = _group_metadata(
                    row, offset, 4, KEY_MID, KEY_MID_SHIFTED, KEY_DIM, KEY_PADDED, KEY_GROUP, KEY_LENGTH,
                    TILE // KEY_LENGTH,
                )  # fmt: skip
                states = (codes * scale + mid).to(DOT)
                products = tl.dot(states, prepared.to(DOT), input_precision=PRECISION)
            if KEY_FACTOR:
                products *= _token_factors(row, offset, KEY_LENGTH)
            logits = _logits(products, scaling, softcap, SOFTCAP)
            position = tile * TILE + tl.arange(0, TILE)
            if SINKS > 0:
                covered = (position >= first_sink) & (position < first_sink + SINKS)
                logits = tl.where(covered[:, None], float("-inf"), logits)
            logits = _visible(logits, position, mask, mask_row, line, QUERIES, mask_query_stride, HAS_MASK)
            weights, factor, peak, total_by_place = _weigh(logits, peak, total_by_place)
            row, offset = _locate(value_table, TILE // VALUE_LENGTH, tile, batch_row, head, heads)
            if VALUE_FACTOR:
                weights *= _token_factors(row, offset, VALUE_LENGTH)
            output, shift = _with_values(
                output, shift, weights, factor, row, offset, 0, value_levels, VL, WIDTH, VALUE_SPLIT, VALUE_DIM, VALUE_LENGTH,
                TILE // VALUE_LENGTH, VALUE_MODE, VALUE_GROUP, V0, V1, V2, VS0, VS1, VS2, VALUE_OPEN, VALUE_WIDEN, VALUE_SCALE,
                VALUE_MID, VALUE_SHIFTED, VALUE_MID_SHIFTED, DOT, PRECISION,
            )  # fmt: skip
            if VALUE_SPLIT > 1:
                output1, shift1 = _with_values(
                    output1, shift1, weights, factor, row, offset, 1, value_levels, VL, WIDTH, VALUE_SPLIT, VALUE_DIM, VALUE_LENGTH,
                    TILE // VALUE_LENGTH, VALUE_MODE, VALUE_GROUP, V0, V1, V2, VS0, VS1, VS2, VALUE_OPEN, VALUE_WIDEN, VALUE_SCALE,
                    VALUE_MID, VALUE_SHIFTED, VALUE_MID_SHIFTED, DOT, PRECISION,
                )  # fmt: skip
            if VALUE_SPLIT > 2:
                output2, shift2 = _with_values(
                    output2, shift2, weights, factor, row, offset, 2, value_levels, VL, WIDTH, VALUE_SPLIT, VALUE_DIM, VALUE_LENGTH,
                    TILE // VALUE_LENGTH, VALUE_MODE, VALUE_GROUP, V0, V1, V2, VS0, VS1, VS2, VALUE_OPEN, VALUE_WIDEN, VALUE_SCALE,
                    VALUE_MID, VALUE_SHIFTED, VALUE_MID_SHIFTED, DOT, PRECISION,
                )  # fmt: skip
                output3, shift3 = _with_values(
                    output3, shift3, weights, factor, row, offset, 3, value_levels, VL, WIDTH, VALUE_SPLIT, VALUE_DIM, VALUE_LENGTH,
                    TILE // VALUE_LENGTH, VALUE_MODE, VALUE_GROUP, V0, V1, V2, VS0, VS1, VS2, VALUE_OPEN, VALUE_WIDEN, VALUE_SCALE,
                    VALUE_MID, VALUE_SHIFTED, VALUE_MID_SHIFTED, DOT, PRECISION,
                )  # fmt: skip
        total = tl.sum(total_by_place, axis=0)
        output += tl.sum(shift, axis=0)[None, :]
        if VALUE_SPLIT > 1:
            output1 += tl.sum(shift1, axis=0)[None, :]
        if VALUE_SPLIT > 2:
            output2 += tl.sum(shift2, axis=0)[None, :]
            output3 += tl.sum(shift3, axis=0)[None, :]
    else:
        if WINDOW_TILES > 0:
            held = tl.load(window_length)
            window_tiles = WINDOW_TILES
        else:
            held = window_length
            window_tiles = tl.cdiv(window_length, EXACT_TILE)
        new_tiles = tl.cdiv(new_length, EXACT_TILE)
        number = part - splits
        token = tl.arange(0, EXACT_TILE)
        channel = tl.arange(0, EXACT_PADDED)
        if number < window_tiles:
            token += number * EXACT_TILE
            key_at = window_key + batch_row * wk_batch + head * wk_head + token[:, None] * wk_token + channel[None, :]
            value_at = window_value + batch_row * wv_batch + head * wv_head + token[None, :] * wv_token
            exists = token < held
            position = stored + token
        elif number < window_tiles + new_tiles:
            token += (number - window_tiles) * EXACT_TILE
            key_at = new_key + batch_row * nk_batch + head * nk_head + token[:, None] * nk_token + channel[None, :]
            value_at = new_value + batch_row * nv_batch + head * nv_head + token[None, :] * nv_token
            exists = token < new_length
            position = stored + held + token
        else:
            key_at = sink_key + (pair.to(tl.int64) * SINKS + token[:, None]) * EXACT_DIM + channel[None, :]
            value_at = sink_value + (pair.to(tl.int64) * SINKS + token[None, :]) * VALUE_DIM
            position = first_sink + token
            exists = (token < SINKS) & (position >= 0) & (position < stored)
        exact = _queries(exact_query, pair * rows + line, line < rows, EXACT_DIM, EXACT_PADDED)
        keys = tl.load(key_at, mask=exists[:, None] & (channel < EXACT_DIM)[None, :], other=0.0)
        products = tl.dot(keys.to(DOT), exact.to(DOT), input_precision=PRECISION)
        logits = _logits(products, scaling, softcap, SOFTCAP)
        logits = tl.where(exists[:, None], logits, float("-inf"))
        if IS_CAUSAL:
            behind = position[:, None] - (stored + held) <= (line % QUERIES)[None, :]
            logits = tl.where(behind, logits, float("-inf"))
        position = tl.where(exists, position, -1)
        logits = _visible(logits, position, mask, mask_row, line, QUERIES, mask_query_stride, HAS_MASK)
        weights, _, peak, _ = _weigh(logits, peak, tl.zeros((EXACT_TILE, ROWS), tl.float32))
        total = tl.sum(weights, axis=0)
        output = _with_exact_values(output, weights, value_at, exists, 0, WIDTH, VALUE_DIM, DOT, PRECISION)
        if VALUE_SPLIT > 1:
            output1 = _with_exact_values(output1, weights, value_at, exists, 1, WIDTH, VALUE_DIM, DOT, PRECISION)
        if VALUE_SPLIT > 2:
            output2 = _with_exact_values(output2, weights, value_at, exists, 2, WIDTH, VALUE_DIM, DOT, PRECISION)
            output3 = _with_exact_values(output3, weights, value_at, exists, 3, WIDTH, VALUE_DIM, DOT, PRECISION)
    place = (pair * parts + part).to(tl.int64) * rows + line
    tl.store(peaks + place, peak, mask=line < rows)
    tl.store(totals + place, total, mask=line < rows)
    _store_output(outputs, output, place, line, rows, 0, WIDTH, VALUE_DIM)
    if VALUE_SPLIT > 1:
        _store_output(outputs, output1, place, line, rows, 1, WIDTH, VALUE_DIM)
    if VALUE_SPLIT > 2:
        _store_output(outputs, output2, place, line, rows, 2, WIDTH, VALUE_DIM)
        _store_output(outputs, output3, place, line, rows, 3, WIDTH, VALUE_DIM)


@triton.jit
def combine(
    peaks, totals, outputs, sink_logits, stored_output, output, heads, rows, splits, parts,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, QUERIES: tl.constexpr, HAS_LOGITS: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query vector: program (b * H + h, row).

    Writes `output` `[B, Tq, Hq, VALUE_DIM]`; where APART, what comes from the store goes to `stored_output` instead.
    """
    pair, line = tl.program_id(0), tl.program_id(1)
    queries_per_head = rows // QUERIES
    query_head = (pair % heads) * queries_per_head + line // QUERIES
    channel = tl.arange(0, VALUE_PADDED)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    if HAS_LOGITS:
        peak = tl.load(sink_logits + query_head).to(tl.float32) * LOG2E
        total += 1.0
    from_store = tl.zeros((VALUE_PADDED,), tl.float32)
    exact = tl.zeros((VALUE_PADDED,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        exists = part < parts
        place = (pair.to(tl.int64) * parts + part) * rows + line
        peaks_here = tl.load(peaks + place, mask=exists, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(peaks_here, axis=0))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        kept, added = tl.exp2(peak - safe), tl.exp2(peaks_here - safe)
        total = total * kept + tl.sum(tl.load(totals + place, mask=exists, other=0.0) * added, axis=0)
        values_mask = exists[:, None] & (channel < VALUE_DIM)[None, :]
        values = tl.load(outputs + place[:, None] * VALUE_DIM + channel[None, :], mask=values_mask, other=0.0)
        values *= added[:, None]
        is_stored = (part < splits)[:, None]
        from_store = from_store * kept + tl.sum(tl.where(is_stored, values, 0.0), axis=0)
        exact = exact * kept + tl.sum(tl.where(is_stored, 0.0, values), axis=0)
        peak = new_peak
    total = tl.where(total == 0, 1.0, total)  # a row that saw nothing gives zeros
    batch_row = (pair // heads).to(tl.int64)
    place = (batch_row * QUERIES + line % QUERIES) * (heads * queries_per_head) + query_head
    target = place * VALUE_DIM + channel
    if APART:
        tl.store(stored_output + target, from_store / total, mask=channel < VALUE_DIM)
        tl.store(output + target, exact / total, mask=channel < VALUE_DIM)
    else:
        merged = (from_store + exact) / total
        tl.store(output + target, merged.to(output.dtype.element_ty), mask=channel < VALUE_DIM)
