"""The programs that run on the GPU: split-KV decoding over packed chunks, in Triton.

A program takes the queries of one key-value head to one run of tokens and leaves what an online softmax needs of it;
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

TABLE_COLUMNS = tl.constexpr(8)
"""Of an address table: three planes, scale, mid, exponent, capacity in blocks, rows."""
LOG2E = tl.constexpr(1.4426950408889634)
EXACT_TILE = tl.constexpr(64)
"""Tokens in full precision that one program attends to."""


@triton.jit
def _locate(table, blocks, BLOCKS: tl.constexpr, tile, batch_row, head, heads):
    """Return the table rows of the chunks of a tile's blocks, and the blocks' slots in their parts, int64 [BLOCKS]."""
    number = tile * BLOCKS + tl.arange(0, BLOCKS)
    row = table + tl.load(blocks + 2 * number) * TABLE_COLUMNS
    index = tl.load(blocks + 2 * number + 1)
    rows = tl.load(row + 7)
    chunk_row = tl.load(rows.to(tl.pointer_type(tl.int64)) + batch_row, mask=rows != 0, other=batch_row)
    return row, (chunk_row * heads + head) * tl.load(row + 6) + index


@triton.jit
def _key_plane(
    row, slot, PLANE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return one plane of the codes of keys, int32 [PADDED, BLOCKS * LENGTH]."""
    PER: tl.constexpr = LENGTH * WIDTH // 8
    COUNT: tl.constexpr = 8 // WIDTH
    start = (tl.load(row + PLANE) + slot * (DIM * PER)).to(tl.pointer_type(tl.uint8))
    if DIM * PER % 16 == 0:
        start = tl.multiple_of(start, 16)
    channel = tl.arange(0, PADDED)[:, None, None, None]
    place = channel * PER + tl.arange(0, PER)[None, None, None, :]
    pointers = start[None, :, None, None] + place
    packed = tl.load(pointers, mask=channel < DIM, other=0).to(tl.int32)
    shifts = (tl.arange(0, COUNT) * WIDTH)[None, None, :, None]
    return tl.reshape((packed >> shifts) & (2**WIDTH - 1), (PADDED, BLOCKS * LENGTH))


@triton.jit
def _value_plane(
    row, slot, PLANE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return one plane of the codes of values, int32 [BLOCKS * LENGTH, PADDED]."""
    PER: tl.constexpr = LENGTH * WIDTH // 8
    COUNT: tl.constexpr = 8 // WIDTH
    start = (tl.load(row + PLANE) + slot * (DIM * PER)).to(tl.pointer_type(tl.uint8))
    if DIM * PER % 16 == 0:
        start = tl.multiple_of(start, 16)
    channel = tl.arange(0, PADDED)[None, None, None, :]
    place = tl.arange(0, PER)[None, None, :, None] * DIM + channel
    pointers = start[:, None, None, None] + place
    packed = tl.load(pointers, mask=channel < DIM, other=0).to(tl.int32)
    shifts = (tl.arange(0, COUNT) * WIDTH)[None, :, None, None]
    return tl.reshape((packed >> shifts) & (2**WIDTH - 1), (BLOCKS * LENGTH, PADDED))


@triton.jit
def _key_codes(
    row, slot, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the centred codes of keys, int32 [PADDED, BLOCKS * LENGTH]."""
    codes = _key_plane(row, slot, 0, W0, DIM, PADDED, LENGTH, BLOCKS)
    if W1 > 0:
        codes |= _key_plane(row, slot, 1, W1, DIM, PADDED, LENGTH, BLOCKS) << W0
    if W2 > 0:
        codes |= _key_plane(row, slot, 2, W2, DIM, PADDED, LENGTH, BLOCKS) << (W0 + W1)
    return codes - 2 ** (W0 + W1 + W2 - 1)


@triton.jit
def _value_codes(
    row, slot, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the centred codes of values, int32 [BLOCKS * LENGTH, PADDED]."""
    codes = _value_plane(row, slot, 0, W0, DIM, PADDED, LENGTH, BLOCKS)
    if W1 > 0:
        codes |= _value_plane(row, slot, 1, W1, DIM, PADDED, LENGTH, BLOCKS) << W0
    if W2 > 0:
        codes |= _value_plane(row, slot, 2, W2, DIM, PADDED, LENGTH, BLOCKS) << (W0 + W1)
    return codes - 2 ** (W0 + W1 + W2 - 1)


@triton.jit
def _factor(row, slot, SHIFTED: tl.constexpr):
    """Return the power of two of each block, fp32 [BLOCKS]; one where metadata carry none."""
    if SHIFTED:
        exponent = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.int8)) + slot)
        return tl.exp2(exponent.to(tl.float32))
    else:
        return tl.full(slot.shape, 1.0, tl.float32)


@triton.jit
def _channel_metadata(
    row, slot, COLUMN: tl.constexpr, DTYPE: tl.constexpr, SHIFTED: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """Return scale or mid of each channel of one block, fp32 [PADDED]."""
    channel = tl.arange(0, PADDED)[None, :]
    pointers = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))[:, None] + (slot * DIM)[:, None] + channel
    metadata = tl.load(pointers, mask=channel < DIM, other=0.0).to(tl.float32)
    return tl.reshape(metadata * _factor(row, slot, SHIFTED)[:, None], (PADDED,))


@triton.jit
def _token_metadata(
    row, slot, COLUMN: tl.constexpr, DTYPE: tl.constexpr, SHIFTED: tl.constexpr, LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return scale or mid of each token, where it has one, fp32 [BLOCKS * LENGTH]."""
    place = (slot * LENGTH)[:, None] + tl.arange(0, LENGTH)[None, :]
    metadata = tl.load(tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))[:, None] + place).to(tl.float32)
    return tl.reshape(metadata * _factor(row, slot, SHIFTED)[:, None], (BLOCKS * LENGTH,))


@triton.jit
def _group_metadata(
    row, slot, COLUMN: tl.constexpr, DTYPE: tl.constexpr, SHIFTED: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, GROUP: tl.constexpr, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return scale or mid of each element, where a token has several, fp32 [BLOCKS * LENGTH, PADDED]."""
    GROUPS: tl.constexpr = (DIM + GROUP - 1) // GROUP
    if GROUPS * GROUP == PADDED and GROUP & (GROUP - 1) == 0:
        place = ((slot * LENGTH)[:, None, None] + tl.arange(0, LENGTH)[None, :, None]) * GROUPS
        place += tl.arange(0, GROUPS)[None, None, :]
        metadata = tl.load(tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))[:, None, None] + place).to(tl.float32)
        metadata *= _factor(row, slot, SHIFTED)[:, None, None]
        spread = tl.broadcast_to(metadata[:, :, :, None], (BLOCKS, LENGTH, GROUPS, GROUP))
        return tl.reshape(spread, (BLOCKS * LENGTH, PADDED))
    channel = tl.arange(0, PADDED)[None, None, :]
    token = (slot * LENGTH)[:, None, None] + tl.arange(0, LENGTH)[None, :, None]
    pointers = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))[:, None, None] + token * GROUPS + channel // GROUP
    metadata = tl.load(pointers, mask=channel < DIM, other=0.0).to(tl.float32)
    return tl.reshape(metadata * _factor(row, slot, SHIFTED)[:, None, None], (BLOCKS * LENGTH, PADDED))


@triton.jit
def _divisor(scale):
    """Return the largest scale, by which scales are divided before they meet a narrow dtype; one if all are 0."""
    largest = tl.max(scale, axis=0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def _visible(
    scores, position, mask, mask_row, QUERIES: tl.constexpr, ROWS: tl.constexpr, stride, HAS_MASK: tl.constexpr
):
    """Return scores without the tokens that the mask hides."""
    if HAS_MASK:
        query = tl.arange(0, ROWS) % QUERIES
        seen = tl.load(
            mask + mask_row + query[:, None] * stride + position[None, :], mask=(position >= 0)[None, :], other=0
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
    """Return weights, the factor of the earlier sums, the new peak and the new sum of weights."""
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits - safe[:, None])
    factor = tl.exp2(peak - safe)
    return weights, factor, new_peak, total * factor + tl.sum(weights, axis=1)


@triton.jit
def attend_parts(
    query, exact_query, key_table, key_blocks, value_table, value_blocks, stored_length, window_key, window_value,
    new_key, new_value, sink_key, sink_value, starts, mask, peaks, totals, outputs, scaling, softcap, heads, rows,
    splits, parts, tiles_per_split, window_length, new_length, mask_batch_stride, mask_query_stride,
    wk_batch, wk_head, wk_token, wv_batch, wv_head, wv_token, nk_batch, nk_head, nk_token, nv_batch, nv_head, nv_token,
    KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, KEY_LENGTH: tl.constexpr,
    VALUE_LENGTH: tl.constexpr, KEY_MODE: tl.constexpr, VALUE_MODE: tl.constexpr, KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, V2: tl.constexpr, KEY_SCALE: tl.constexpr, KEY_MID: tl.constexpr, KEY_SHIFTED: tl.constexpr,
    KEY_MID_SHIFTED: tl.constexpr, VALUE_SCALE: tl.constexpr, VALUE_MID: tl.constexpr, VALUE_SHIFTED: tl.constexpr,
    VALUE_MID_SHIFTED: tl.constexpr, SINKS: tl.constexpr, HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to one run of tokens: program (b * H + h, part); parts are splits of the store, then exact tokens.

    Writes peak and sum of the weights and the weighted sum of the values, `[B * H, parts, rows]` and `[..., VALUE_DIM]`.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    batch_row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    line = tl.arange(0, ROWS)
    channel = tl.arange(0, KEY_PADDED)
    value_channel = tl.arange(0, VALUE_PADDED)
    query_place = (pair * rows + line)[:, None] * KEY_DIM + channel[None, :]
    query_mask = (line < rows)[:, None] & (channel < KEY_DIM)[None, :]
    stored = tl.load(stored_length)
    mask_row = batch_row * mask_batch_stride
    first_sink = tl.load(starts + batch_row) if SINKS > 0 else stored
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, VALUE_PADDED), tl.float32)
    if part < splits:
        prepared = tl.load(query + query_place, mask=query_mask, other=0.0).to(tl.float32)
        first = part * tiles_per_split
        last = tl.minimum(first + tiles_per_split, stored // TILE)
        for tile in range(first, last):
            row, slot = _locate(key_table, key_blocks, TILE // KEY_LENGTH, tile, batch_row, head, heads)
            codes = _key_codes(row, slot, K0, K1, K2, KEY_DIM, KEY_PADDED, KEY_LENGTH, TILE // KEY_LENGTH)
            if KEY_MODE == PER_CHANNEL:
                scale = _channel_metadata(row, slot, 3, KEY_SCALE, KEY_SHIFTED, KEY_DIM, KEY_PADDED)
                mid = _channel_metadata(row, slot, 4, KEY_MID, KEY_MID_SHIFTED, KEY_DIM, KEY_PADDED)
                divisor = _divisor(scale)
                folded = (prepared * (scale / divisor)[None, :]).to(DOT)
                products = tl.dot(folded, codes.to(DOT), input_precision=PRECISION) * divisor
                products += tl.sum(prepared * mid[None, :], axis=1)[:, None]
            elif KEY_MODE == PER_TOKEN:
                scale = _token_metadata(row, slot, 3, KEY_SCALE, KEY_SHIFTED, KEY_LENGTH, TILE // KEY_LENGTH)
                mid = _token_metadata(row, slot, 4, KEY_MID, KEY_MID_SHIFTED, KEY_LENGTH, TILE // KEY_LENGTH)
                products = tl.dot(prepared.to(DOT), codes.to(DOT), input_precision=PRECISION) * scale[None, :]
                products += tl.sum(prepared, axis=1)[:, None] * mid[None, :]
            else:
                scale = _group_metadata(
                    row, slot, 3, KEY_SCALE, KEY_SHIFTED, KEY_DIM, KEY_PADDED, KEY_GROUP, KEY_LENGTH, TILE // KEY_LENGTH
                )
                mid = _group_metadata(
                    row, slot, 4, KEY_MID, KEY_MID_SHIFTED, KEY_DIM, KEY_PADDED, KEY_GROUP, KEY_LENGTH,
                    TILE // KEY_LENGTH,
                )  # fmt: skip
                states = (codes.to(tl.float32) * tl.trans(scale) + tl.trans(mid)).to(DOT)
                products = tl.dot(prepared.to(DOT), states, input_precision=PRECISION)
            logits = _logits(products, scaling, softcap, SOFTCAP)
            position = tile * TILE + tl.arange(0, TILE)
            if SINKS > 0:
                covered = (position >= first_sink) & (position < first_sink + SINKS)
                logits = tl.where(covered[None, :], float("-inf"), logits)
            logits = _visible(logits, position, mask, mask_row, QUERIES, ROWS, mask_query_stride, HAS_MASK)
            weights, factor, peak, total = _weigh(logits, peak, total)
            output = output * factor[:, None]
            row, slot = _locate(value_table, value_blocks, TILE // VALUE_LENGTH, tile, batch_row, head, heads)
            codes = _value_codes(row, slot, V0, V1, V2, VALUE_DIM, VALUE_PADDED, VALUE_LENGTH, TILE // VALUE_LENGTH)
            if VALUE_MODE == PER_CHANNEL:
                scale = _channel_metadata(row, slot, 3, VALUE_SCALE, VALUE_SHIFTED, VALUE_DIM, VALUE_PADDED)
                mid = _channel_metadata(row, slot, 4, VALUE_MID, VALUE_MID_SHIFTED, VALUE_DIM, VALUE_PADDED)
                output += tl.dot(weights.to(DOT), codes.to(DOT), input_precision=PRECISION) * scale[None, :]
                output += tl.sum(weights, axis=1)[:, None] * mid[None, :]
            elif VALUE_MODE == PER_TOKEN:
                scale = _token_metadata(row, slot, 3, VALUE_SCALE, VALUE_SHIFTED, VALUE_LENGTH, TILE // VALUE_LENGTH)
                mid = _token_metadata(row, slot, 4, VALUE_MID, VALUE_MID_SHIFTED, VALUE_LENGTH, TILE // VALUE_LENGTH)
                divisor = _divisor(scale)
                folded = (weights * (scale / divisor)[None, :]).to(DOT)
                output += tl.dot(folded, codes.to(DOT), input_precision=PRECISION) * divisor
                output += tl.sum(weights * mid[None, :], axis=1)[:, None]
            else:
                scale = _group_metadata(
                    row, slot, 3, VALUE_SCALE, VALUE_SHIFTED, VALUE_DIM, VALUE_PADDED, VALUE_GROUP, VALUE_LENGTH,
                    TILE // VALUE_LENGTH,
                )  # fmt: skip
                mid = _group_metadata(
                    row, slot, 4, VALUE_MID, VALUE_MID_SHIFTED, VALUE_DIM, VALUE_PADDED, VALUE_GROUP, VALUE_LENGTH,
                    TILE // VALUE_LENGTH,
                )  # fmt: skip
                states = (codes.to(tl.float32) * scale + mid).to(DOT)
                output += tl.dot(weights.to(DOT), states, input_precision=PRECISION)
    else:
        window_tiles = tl.cdiv(window_length, EXACT_TILE)
        new_tiles = tl.cdiv(new_length, EXACT_TILE)
        number = part - splits
        token = tl.arange(0, EXACT_TILE)
        if number < window_tiles:
            token += number * EXACT_TILE
            key_at = window_key + batch_row * wk_batch + head * wk_head + token[None, :] * wk_token + channel[:, None]
            value_at = window_value + batch_row * wv_batch + head * wv_head + token[:, None] * wv_token
            exists = token < window_length
            position = stored + token
        elif number < window_tiles + new_tiles:
            token += (number - window_tiles) * EXACT_TILE
            key_at = new_key + batch_row * nk_batch + head * nk_head + token[None, :] * nk_token + channel[:, None]
            value_at = new_value + batch_row * nv_batch + head * nv_head + token[:, None] * nv_token
            exists = token < new_length
            position = stored + window_length + token
        else:
            key_at = sink_key + (pair.to(tl.int64) * SINKS + token[None, :]) * KEY_DIM + channel[:, None]
            value_at = sink_value + (pair.to(tl.int64) * SINKS + token[:, None]) * VALUE_DIM
            exists = (token < SINKS) & (first_sink + token < stored)
            position = first_sink + token
        exact = tl.load(exact_query + query_place, mask=query_mask, other=0.0)
        keys = tl.load(key_at, mask=exists[None, :] & (channel < KEY_DIM)[:, None], other=0.0)
        products = tl.dot(exact.to(DOT), keys.to(DOT), input_precision=PRECISION)
        logits = _logits(products, scaling, softcap, SOFTCAP)
        logits = tl.where(exists[None, :], logits, float("-inf"))
        if IS_CAUSAL:
            behind = position[None, :] - (stored + window_length) <= (line % QUERIES)[:, None]
            logits = tl.where(behind, logits, float("-inf"))
        position = tl.where(exists, position, -1)
        logits = _visible(logits, position, mask, mask_row, QUERIES, ROWS, mask_query_stride, HAS_MASK)
        weights, factor, peak, total = _weigh(logits, peak, total)
        value_mask = exists[:, None] & (value_channel < VALUE_DIM)[None, :]
        values = tl.load(value_at + value_channel[None, :], mask=value_mask, other=0.0)
        output += tl.dot(weights.to(DOT), values.to(DOT), input_precision=PRECISION)
    place = (pair * parts + part).to(tl.int64) * rows + line
    tl.store(peaks + place, peak, mask=line < rows)
    tl.store(totals + place, total, mask=line < rows)
    output_mask = (line < rows)[:, None] & (value_channel < VALUE_DIM)[None, :]
    tl.store(outputs + place[:, None] * VALUE_DIM + value_channel[None, :], output, mask=output_mask)


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
    for part in range(parts):
        place = (pair * parts + part).to(tl.int64) * rows + line
        other = tl.load(peaks + place)
        new_peak = tl.maximum(peak, other)
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        kept, added = tl.exp2(peak - safe), tl.exp2(other - safe)
        total = total * kept + tl.load(totals + place) * added
        values = tl.load(outputs + place * VALUE_DIM + channel, mask=channel < VALUE_DIM, other=0.0) * added
        is_stored = part < splits
        from_store = from_store * kept + tl.where(is_stored, values, 0.0)
        exact = exact * kept + tl.where(is_stored, 0.0, values)
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
