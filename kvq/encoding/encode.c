/* What the store does around an affine quantizer, block by block: rotate, balance, clip, round, and pack codes
 * and metadata. Every number is made by the operations of kvq/store/affine.py and what it calls, in the same order, so
 * every byte is the same: compare them line by line. That forbids fused multiply-adds and sums in another order.
 *
 * A tile is one block of one head, channel-major [D][L]: then all of it but the first copy runs along whole vectors of
 * tokens. The number of tokens L is a multiple of 8.
 */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));

enum { F32 = 0, F16 = 1, BF16 = 2, U8 = 4, I8 = 5 }; /* as in structures.py */
enum { WHOLE = 0, PREPARE = 1, STORE = 2, DECODE = 3 };
#define ZERO_SCALE 255
#define LOST_MID -128
#define LARGEST_MID 127
#define FACTORS 256
#define LARGEST_EXPONENT 100
#define EXPONENT_TARGET 14
#define LOWEST_EXPONENT -1000
#define ROUNDER 12582912.0f /* 1.5 * 2 ** 23: added to a small number it rounds it to nearest, ties to even */
#define INFINITE 0x7f800000

/* Mirrored in structures.py; the fields must agree. */
typedef struct {
  void *states; /* [B, H, T, D], D contiguous; strides in elements; written to by DECODE alone */
  int64_t batch_stride, head_stride, token_stride, states_type;
  int64_t batch, heads, blocks;
  int64_t head_dim, block_length, group_length, groups; /* groups of one token; 1 per channel */
  int64_t per_channel, packs_rows; /* packs_rows: a plane is [D][bytes], else [bytes][D] */
  int64_t bits, plane_count, widths[3];
  const int8_t *signs; /* of the rotation; NULL: none */
  int64_t rotation_block;
  int64_t has_factor, clips;
  int64_t scale_type, mid_type, has_exponent, shifts_mid, has_units;
  float rotation_scale, clip_margin;
  const float *inverse_factors, *factor_bounds, *scale_bounds; /* [256], [255], [255] */
  const float *factors; /* [256] */
  /* The parts, [B, H, blocks, ...] each; for DECODE a view, whose rows and heads are so many blocks apart. */
  int64_t row_blocks, head_blocks;
  uint8_t *planes[3], *scale, *mid;
  int8_t *exponent;
  float *units;
  uint8_t *factor;
  /* Between both halves: what a quantizer is given and what it says, whole groups in their order, see AffineCodec. */
  float *group_values;
  uint8_t *lost;
  const uint8_t *codes;
  const float *said_scale, *said_offset;
  /* Of ErrorFeedback: channels by place, and what a place loses of the error of an earlier one; NULL: round to nearest. */
  const int64_t *order;   /* [H, D] */
  const float *weights;   /* [H, D, D] */
  int64_t stage, threads;
  void *run_parallel; /* GOMP_parallel, or NULL: one thread */
} request_t;

typedef struct {
  const request_t *q;
  int64_t row, head, block, place; /* place: number of the block among all that the request has */
  float *tile, *other;             /* [D][L] each; where one ends the other begins */
  float *low, *high, *inverse, *start, *first, *step, *scale, *offset, *mid;
  int32_t *rounded;
  uint8_t *codes, *lost, *bytes;
} work_t;

static inline vf load(const float *p) { return *(const vf_any *)p; }
static inline void store(float *p, vf x) { *(vf_any *)p = x; }
static inline vf splat(float x) { return x - (vf){0}; }
static inline vf choose(vi condition, vf yes, vf no) { return (vf)(((vi)yes & condition) | ((vi)no & ~condition)); }
static inline vf larger(vf a, vf b) { return choose(a > b, a, b); }
static inline vf smaller(vf a, vf b) { return choose(a < b, a, b); }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t size_of(int64_t type) { return type == F32 ? 4 : type == F16 || type == BF16 ? 2 : 1; }
static inline int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float of_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline float half_to_float(uint16_t h) {
  int32_t magnitude = (int32_t)(h & 0x7fff) << 13;
  int32_t bits = magnitude >= 0x0f800000 ? magnitude | INFINITE : bits_of(of_bits(magnitude) * 0x1p112f);
  return of_bits(bits | (int32_t)((uint32_t)(h & 0x8000) << 16));
}

static inline uint16_t float_to_half(float x) {
  uint32_t bits = (uint32_t)bits_of(x), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > INFINITE) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00; /* rounds past the largest */
  if (bits < 0x38800000)                        /* denormal: adding 0.5 lets the adder round */
    return sign | (uint16_t)(bits_of(of_bits((int32_t)bits) + 0.5f) - 0x3f000000);
  return sign | (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

static inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits = (uint32_t)bits_of(x);
  if (x != x) return (uint16_t)(bits >> 16) | 0x40;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* The binary exponent of a number as frexp has it. */
static inline int32_t exponent_of(float x) {
  int32_t field = (bits_of(x) & INFINITE) >> 23, exponent;
  if (x == 0 || field == 255) return LOWEST_EXPONENT;
  if (field) return field - 126;
  frexpf(x, &exponent);
  return exponent;
}

/* How many of `count` rising bounds are below a number. */
static inline int64_t bucket(const float *bounds, int64_t count, float x) {
  int64_t first = 0;
  while (count > 0) {
    int64_t half = count / 2;
    if (bounds[first + half] < x) first += half + 1, count -= half + 1;
    else count = half;
  }
  return first;
}

/* ---- From states to groups */

static void read_tile(const work_t *w) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length;
  int64_t place = w->row * q->batch_stride + w->head * q->head_stride + w->block * L * q->token_stride;
  for (int64_t t = 0; t < L; t += 8) {
    int64_t from = place + t * q->token_stride, step = q->token_stride;
    float *to = w->tile + t;
    if (q->states_type == F32) {
      const float *x = (const float *)q->states + from;
      for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < 8; i++) to[d * L + i] = x[i * step + d];
    } else if (q->states_type == BF16) {
      const uint16_t *x = (const uint16_t *)q->states + from;
      for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < 8; i++) to[d * L + i] = of_bits((int32_t)((uint32_t)x[i * step + d] << 16));
    } else {
      const uint16_t *x = (const uint16_t *)q->states + from;
      for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < 8; i++) to[d * L + i] = half_to_float(x[i * step + d]);
    }
  }
}

/* add_and_subtract of kvq/plugin_api/hadamard.py: neighbours to their sums, then their differences, in two rooms in turn. */
static void transform(work_t *w) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length, half = q->rotation_block / 2;
  for (int64_t left = q->rotation_block; left > 1; left /= 2) {
    for (int64_t d = 0; d < D; d += q->rotation_block)
      for (int64_t i = 0; i < half; i++) {
        const float *from = w->tile + (d + 2 * i) * L;
        float *sums = w->other + (d + i) * L, *differences = sums + half * L;
        for (int64_t t = 0; t < L; t += VL) {
          vf first = load(from + t), second = load(from + L + t);
          store(sums + t, first + second);
          store(differences + t, first - second);
        }
      }
    float *swapped = w->tile;
    w->tile = w->other, w->other = swapped;
  }
}

/* HadamardRotation.apply. */
static void rotate(work_t *w) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length;
  for (int64_t d = 0; d < D; d++)
    for (int64_t t = 0; t < L; t += VL) store(w->tile + d * L + t, load(w->tile + d * L + t) * (float)q->signs[d]);
  transform(w);
  for (int64_t i = 0; i < D * L; i += VL) store(w->tile + i, load(w->tile + i) * q->rotation_scale);
}

/* HadamardRotation.undo. */
static void rotate_back(work_t *w) {
  const request_t *q = w->q;
  int64_t L = q->block_length;
  transform(w);
  for (int64_t d = 0; d < q->head_dim; d++) {
    float factor = (float)q->signs[d] * q->rotation_scale;
    for (int64_t t = 0; t < L; t += VL) store(w->tile + d * L + t, load(w->tile + d * L + t) * factor);
  }
}

static inline vf finite_or_zero(vf x) {
  return (vf)((vi)x & (vi)(((vi)x & INFINITE) != INFINITE));
}

/* even_out of kvq/store/balance.py. */
static void balance(work_t *w, uint8_t *codes) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length;
  vf highest = {0};
  for (int64_t i = 0; i < D * L; i += VL) {
    vf x = finite_or_zero(load(w->tile + i));
    highest = larger((vf)((vi)x & 0x7fffffff), highest);
  }
  float peak = 0;
  for (int i = 0; i < VL; i++) peak = highest[i] > peak ? highest[i] : peak;
  memset(codes, 0, L);
  int32_t exponent = exponent_of(peak);
  if (peak == 0 || exponent > LARGEST_EXPONENT) return;
  float unit = exponent < -126 ? 0x1p126f : of_bits((127 - exponent) << 23);
  int64_t count = 1;
  while (count < D) count *= 2;
  for (int64_t half = count > 1 ? count / 2 : 1, d = 0; d < half; d++)
    for (int64_t t = 0; t < L; t += VL) {
      vf low = finite_or_zero(load(w->tile + d * L + t)) * unit, total = low * low;
      if (count > 1) {
        vf high = d + half < D ? finite_or_zero(load(w->tile + (d + half) * L + t)) * unit : (vf){0};
        total = total + high * high;
      }
      store(w->other + d * L + t, total);
    }
  for (int64_t half = count / 4; half; half /= 2)
    for (int64_t i = 0; i < half * L; i += VL) store(w->other + i, load(w->other + i) + load(w->other + half * L + i));
  float largest = 0, *inverse = w->other + L; /* sums of one token are left: the room behind them is free */
  for (int64_t t = 0; t < L; t++) largest = w->other[t] > largest ? w->other[t] : largest;
  for (int64_t t = 0; t < L; t++) {
    codes[t] = (uint8_t)bucket(q->factor_bounds, FACTORS - 1, largest / w->other[t]);
    inverse[t] = q->inverse_factors[codes[t]];
  }
  for (int64_t d = 0; d < D; d++)
    for (int64_t t = 0; t < L; t += VL) store(w->tile + d * L + t, load(w->tile + d * L + t) * load(inverse + t));
}

static inline int has_lanes(vi condition) {
  int32_t found = 0;
  for (int i = 0; i < VL; i++) found |= condition[i];
  return found != 0;
}

/* Extremes of each group, in the order [D] per channel, [group][L] per token; zeros where one is lost. */
static void find_extremes(work_t *w) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length, G = q->group_length;
  if (q->per_channel) {
    for (int64_t d = 0; d < D; d++) {
      float *row = w->tile + d * L;
      vf low = load(row), high = low;
      vi lost = {0};
      for (int64_t t = 0; t < L; t += VL) {
        vf x = load(row + t);
        lost |= ((vi)x & INFINITE) == INFINITE;
        low = smaller(x, low), high = larger(x, high);
      }
      w->lost[d] = (uint8_t)has_lanes(lost);
      if (w->lost[d]) {
        memset(row, 0, 4 * L);
        low = high = (vf){0};
      }
      float least_one = low[0], largest = high[0];
      for (int i = 1; i < VL; i++) {
        least_one = low[i] < least_one ? low[i] : least_one;
        largest = high[i] > largest ? high[i] : largest;
      }
      w->low[d] = least_one, w->high[d] = largest;
    }
    return;
  }
  for (int64_t g = 0; g < q->groups; g++)
    for (int64_t t = 0; t < L; t += VL) {
      float *first = w->tile + g * G * L + t;
      int64_t count = least(G, D - g * G);
      vf low = load(first), high = low;
      vi lost = {0};
      for (int64_t d = 0; d < count; d++) {
        vf x = load(first + d * L);
        lost |= ((vi)x & INFINITE) == INFINITE;
        low = smaller(x, low), high = larger(x, high);
      }
      if (has_lanes(lost)) {
        for (int64_t d = 0; d < count; d++) store(first + d * L, choose(lost, (vf){0}, load(first + d * L)));
        low = choose(lost, (vf){0}, low), high = choose(lost, (vf){0}, high);
      }
      store(w->low + g * L + t, low), store(w->high + g * L + t, high);
      for (int i = 0; i < VL; i++) w->lost[g * L + t + i] = lost[i] != 0;
    }
}

/* The numbers of a group that a row of the tile meets: one of its channel, or one for each of its tokens. */
static inline vf meet(const request_t *q, const float *of_groups, int64_t d, int64_t t) {
  return q->per_channel ? splat(of_groups[d]) : load(of_groups + d / q->group_length * q->block_length + t);
}

/* clip of kvq/store/clipping.py; the extremes become those of the narrower range. */
static void clip(work_t *w, int64_t count) {
  const request_t *q = w->q;
  for (int64_t i = 0; i < count; i += VL) {
    vf low = load(w->low + i), high = load(w->high + i), cut = high * q->clip_margin - low * q->clip_margin;
    store(w->low + i, low + cut), store(w->high + i, high - cut);
  }
  for (int64_t d = 0; d < q->head_dim && !q->order; d++) /* error feedback makes up for what is cut, too */
    for (int64_t t = 0; t < q->block_length; t += VL) {
      float *place = w->tile + d * q->block_length + t;
      store(place, smaller(meet(q, w->high, d, t), larger(meet(q, w->low, d, t), load(place))));
    }
  /* Where rounding crossed them, all elements are the upper one. */
  for (int64_t i = 0; i < count; i += VL) store(w->low + i, smaller(load(w->low + i), load(w->high + i)));
}

/* ---- Rounding to nearest, as NativeQuantizer does without a search */

static void find_lines(work_t *w, int64_t count) {
  const request_t *q = w->q;
  float largest_code = (float)((1 << q->bits) - 1);
  for (int64_t i = 0; i < count; i += VL) {
    vf low = load(w->low + i), high = load(w->high + i);
    vf bounded = larger(high - low, (vf)((vi)low & 0x7fffffff) * 0x1p-24f);
    bounded = smaller(larger(bounded, splat(0x1p-126f)), splat(FLT_MAX));
    vi field = (vi)bounded >> 23;
    vf unit = (vf)(field << 23);
    /* Times the inverse, a power of two, is as exact as a division; that of the largest unit is denormal. */
    vf inverse = choose(field == 254, splat(0x1p-127f), (vf)((254 - field) << 23));
    vf start = low * inverse, extent = high * inverse - start;
    vf step = extent / largest_code, scale = step * unit;
    vi is_short = (scale * inverse < step) & (scale < FLT_MAX);
    scale = smaller((vf)((vi)scale - is_short), splat(FLT_MAX)); /* the next number, where it is short */
    vf offset = smaller(larger((start + extent * 0.0f) * unit, splat(-FLT_MAX)), splat(FLT_MAX));
    step = scale * inverse;
    store(w->inverse + i, inverse), store(w->start + i, start), store(w->first + i, offset * inverse - start);
    store(w->step + i, choose(step == 0, splat(1), step));
    store(w->scale + i, scale), store(w->offset + i, offset);
  }
}

static void find_codes(work_t *w) {
  const request_t *q = w->q;
  int64_t L = q->block_length;
  vf largest_code = splat((float)((1 << q->bits) - 1));
  for (int64_t d = 0; d < q->head_dim; d++) {
    for (int64_t t = 0; t < L; t += VL) {
      vf x = load(w->tile + d * L + t) * meet(q, w->inverse, d, t) - meet(q, w->start, d, t);
      x = (x - meet(q, w->first, d, t)) / meet(q, w->step, d, t);
      x = smaller(larger(x, (vf){0}), largest_code) + ROUNDER;
      store((float *)w->rounded + t, x);
    }
    for (int64_t t = 0; t < L; t++) w->codes[d * L + t] = (uint8_t)w->rounded[t];
  }
}

static void read_metadata(work_t *w, int64_t count, const int32_t *to);

/* _round_channels of kvq/store/error_feedback.py, against the lines that are stored. */
static void feed_back(work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length;
  float half = (float)(1 << (q->bits - 1)), *error = w->other; /* a room that is free after balance */
  const int64_t *order = q->order + w->head * D;
  read_metadata(w, count, to);
  for (int64_t place = 0; place < D; place++) {
    int64_t d = order[place];
    const float *row = w->tile + d * L, *shares = q->weights + (w->head * D + place) * D;
    for (int64_t t = 0; t < L; t += VL) {
      vf x = load(row + t), scale = meet(q, w->scale, d, t), mid = meet(q, w->mid, d, t);
      vf step = (x - mid) / choose(scale == 0, splat(1), scale);
      step = choose(step == step, smaller(larger(step, splat(-half)), splat(half - 1)), (vf){0});
      step = (step + ROUNDER) - ROUNDER;
      store((float *)w->rounded + t, (step + half) + ROUNDER);
      vf read = step * scale;
      store(error + t, finite_or_zero(x - (read + mid)));
    }
    for (int64_t t = 0; t < L; t++) w->codes[d * L + t] = (uint8_t)w->rounded[t];
    for (int64_t later = place + 1; later < D; later++) {
      float *other = w->tile + order[later] * L;
      for (int64_t t = 0; t < L; t += VL) {
        vf share = load(error + t) * shares[later];
        store(other + t, load(other + t) - share);
      }
    }
  }
}

/* ---- From codes and lines to parts */

static void pack(const work_t *w) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length, shift = 0;
  for (int64_t plane = 0; plane < q->plane_count; plane++) {
    int width = (int)q->widths[plane], parts = 8 / width;
    int64_t count = L / parts;
    uint8_t mask = (uint8_t)((1 << width) - 1), *out = q->planes[plane] + w->place * count * D;
    for (int64_t d = 0; d < D; d++) {
      const uint8_t *codes = w->codes + d * L;
      uint8_t *bytes = q->packs_rows ? out + d * count : w->bytes;
      for (int64_t i = 0; i < count; i++) bytes[i] = codes[i] >> shift & mask;
      for (int part = 1; part < parts; part++)
        for (int64_t i = 0; i < count; i++)
          bytes[i] |= (uint8_t)((codes[part * count + i] >> shift & mask) << (width * part));
      if (!q->packs_rows)
        for (int64_t i = 0; i < count; i++) out[i * D + d] = bytes[i];
    }
    shift += width;
  }
}

static void write_number(uint8_t *out, int64_t type, int64_t place, float x) {
  if (type == F32) ((float *)out)[place] = x;
  else ((uint16_t *)out)[place] = float_to_half(x);
}

/* write_bytes of kvq/store/byte_metadata.py; `to` is the place of each number among the block's. */
static void write_bytes(const work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  float largest = 0, magnitude = 0;
  for (int64_t i = 0; i < count; i++) {
    float size = fabsf(w->mid[i]);
    largest = w->scale[i] > largest ? w->scale[i] : largest;
    magnitude = size > magnitude ? size : magnitude;
  }
  float step = magnitude / (float)LARGEST_MID;
  uint8_t *scales = q->scale + w->place * count;
  int8_t *mids = (int8_t *)q->mid + w->place * count;
  for (int64_t i = 0; i < count; i++) {
    float scale = w->scale[i], multiple = w->mid[i] / step;
    multiple = multiple > LARGEST_MID ? LARGEST_MID : multiple < -LARGEST_MID ? -LARGEST_MID : multiple;
    /* 0 / 0, where all of the block are 0, is no ratio. */
    int32_t mid = multiple == multiple ? bits_of(multiple + ROUNDER) - bits_of(ROUNDER) : 0;
    scales[to[i]] = scale == 0 ? ZERO_SCALE : (uint8_t)bucket(q->scale_bounds, FACTORS - 1, largest / scale);
    mids[to[i]] = (int8_t)(w->lost[i] ? LOST_MID : mid);
  }
  q->units[2 * w->place] = largest, q->units[2 * w->place + 1] = step;
}

/* AffineCodec._round_metadata. */
static void write_metadata(const work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  if (q->has_units) {
    write_bytes(w, count, to);
    return;
  }
  float factor = 1;
  if (q->has_exponent) {
    int64_t largest = LOWEST_EXPONENT;
    for (int64_t i = 0; i < count; i++) {
      int64_t reach = exponent_of(w->scale[i]) + q->bits;
      if (q->shifts_mid) reach = most(reach, exponent_of(w->mid[i]));
      largest = most(largest, reach);
    }
    int64_t exponent = least(most(largest - EXPONENT_TARGET, -120), 120);
    q->exponent[w->place] = (int8_t)exponent;
    factor = of_bits((int32_t)(127 - exponent) << 23);
  }
  uint8_t *scales = q->scale + w->place * count * size_of(q->scale_type);
  uint8_t *mids = q->mid + w->place * count * size_of(q->mid_type);
  for (int64_t i = 0; i < count; i++) {
    write_number(scales, q->scale_type, to[i], w->scale[i] * factor);
    write_number(mids, q->mid_type, to[i], q->shifts_mid ? w->mid[i] * factor : w->mid[i]);
  }
}

/* `count` groups, of which all stand in the arrays of w. */
static void write_parts(work_t *w, int64_t count, const int32_t *to) {
  float part = of_bits((int32_t)(127 + w->q->bits - 2) << 23);
  for (int64_t i = 0; i < count; i++) {
    float half_way = w->scale[i] * part, mid = (w->offset[i] + half_way) + half_way;
    w->mid[i] = w->lost[i] ? of_bits(0x7fc00000) : mid;
  }
  write_metadata(w, count, to);
  if (w->q->order) feed_back(w, count, to);
  pack(w);
}

/* ---- A quantizer between both halves */

static void hand_out(const work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length, G = q->group_length, per_token = q->groups * G;
  for (int64_t i = 0; i < count; i++) q->lost[w->place * count + to[i]] = w->lost[i];
  if (q->per_channel) {
    memcpy(q->group_values + w->place * D * L, w->tile, 4 * D * L);
    return;
  }
  float *out = q->group_values + w->place * L * per_token;
  for (int64_t d = 0; d < per_token; d++) /* the last group is filled up with its last element */
    for (int64_t t = 0; t < L; t++) out[t * per_token + d] = w->tile[least(d, D - 1) * L + t];
}

static void take_back(work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length, per_token = q->groups * q->group_length;
  for (int64_t i = 0; i < count; i++) {
    int64_t place = w->place * count + to[i];
    w->scale[i] = q->said_scale[place], w->offset[i] = q->said_offset[place], w->lost[i] = q->lost[place];
  }
  const uint8_t *codes = q->codes + w->place * L * (q->per_channel ? D : per_token);
  if (q->per_channel) memcpy(w->codes, codes, D * L);
  else
    for (int64_t d = 0; d < D; d++)
      for (int64_t t = 0; t < L; t++) w->codes[d * L + t] = codes[t * per_token + d];
}

/* ---- From parts to states, as decode_packed of kvq/store/packed_decoding.py */

static float read_number(const uint8_t *from, int64_t type, int64_t place) {
  return type == F32 ? ((const float *)from)[place] : half_to_float(((const uint16_t *)from)[place]);
}

static void read_metadata(work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  const uint8_t *scales = q->scale + w->place * count * size_of(q->scale_type);
  const uint8_t *mids = q->mid + w->place * count * size_of(q->mid_type);
  if (q->has_units) {
    float largest = q->units[2 * w->place], step = q->units[2 * w->place + 1];
    for (int64_t i = 0; i < count; i++) {
      int8_t mid = (int8_t)mids[to[i]];
      w->scale[i] = (scales[to[i]] == ZERO_SCALE ? 0 : q->factors[scales[to[i]]]) * largest;
      w->mid[i] = (mid == LOST_MID ? of_bits(0x7fc00000) : (float)mid) * step;
    }
    return;
  }
  float factor = q->has_exponent ? ldexpf(1, q->exponent[w->place]) : 1;
  for (int64_t i = 0; i < count; i++) {
    w->scale[i] = read_number(scales, q->scale_type, to[i]) * factor;
    w->mid[i] = read_number(mids, q->mid_type, to[i]) * (q->shifts_mid ? factor : 1);
  }
}

static void unpack(work_t *w) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length, shift = 0;
  memset(w->codes, 0, D * L);
  for (int64_t plane = 0; plane < q->plane_count; plane++) {
    int width = (int)q->widths[plane], parts = 8 / width;
    int64_t count = L / parts;
    uint8_t mask = (uint8_t)((1 << width) - 1);
    const uint8_t *in = q->planes[plane] + w->place * count * D;
    for (int64_t d = 0; d < D; d++) {
      const uint8_t *bytes = in + d * count;
      if (!q->packs_rows) {
        for (int64_t i = 0; i < count; i++) w->bytes[i] = in[i * D + d];
        bytes = w->bytes;
      }
      for (int part = 0; part < parts; part++)
        for (int64_t i = 0; i < count; i++)
          w->codes[d * L + part * count + i] |= (uint8_t)((bytes[i] >> (width * part) & mask) << shift);
    }
    shift += width;
  }
}

static void write_states(const work_t *w) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length;
  int64_t place = w->row * q->batch_stride + w->head * q->head_stride + w->block * L * q->token_stride;
  for (int64_t t = 0; t < L; t += 8) { /* a few tokens at a time: what is read and written stays in the nearest cache */
    const float *x = w->tile + t;
    int64_t to = place + t * q->token_stride, step = q->token_stride;
    if (q->states_type == F32) {
      float *out = (float *)q->states + to;
      for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < 8; i++) out[i * step + d] = x[d * L + i];
    } else if (q->states_type == BF16) {
      uint16_t *out = (uint16_t *)q->states + to;
      for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < 8; i++) out[i * step + d] = float_to_bfloat16(x[d * L + i]);
    } else {
      uint16_t *out = (uint16_t *)q->states + to;
      for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < 8; i++) {
          float one = x[d * L + i];
          out[i * step + d] = float_to_half(one > 65504.0f ? 65504.0f : one < -65504.0f ? -65504.0f : one);
        }
    }
  }
}

static void decode_block(work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  int64_t D = q->head_dim, L = q->block_length, half = 1 << (q->bits - 1);
  w->place = w->row * q->row_blocks + w->head * q->head_blocks + w->block;
  read_metadata(w, count, to);
  unpack(w);
  float *factors = w->inverse;
  for (int64_t t = 0; t < L && q->has_factor; t++) factors[t] = q->factors[q->factor[w->place * L + t]];
  for (int64_t d = 0; d < D; d++) {
    float *row = w->tile + d * L;
    for (int64_t t = 0; t < L; t++) row[t] = (float)(w->codes[d * L + t] - half);
    for (int64_t t = 0; t < L; t += VL) {
      vf x = load(row + t) * meet(q, w->scale, d, t);
      x = x + meet(q, w->mid, d, t);
      store(row + t, q->has_factor ? x * load(factors + t) : x);
    }
  }
  if (q->signs) rotate_back(w);
  write_states(w);
}

/* ---- Blocks and threads */

static void serve_block(work_t *w, int64_t count, const int32_t *to) {
  const request_t *q = w->q;
  if (q->stage == DECODE) {
    decode_block(w, count, to);
    return;
  }
  if (q->stage == STORE) {
    take_back(w, count, to);
    write_parts(w, count, to);
    return;
  }
  read_tile(w);
  if (q->signs) rotate(w);
  if (q->has_factor) balance(w, q->factor + w->place * q->block_length);
  find_extremes(w);
  if (q->clips) clip(w, count);
  if (q->stage == PREPARE) {
    hand_out(w, count, to);
    return;
  }
  find_lines(w, count);
  if (!q->order) find_codes(w);
  write_parts(w, count, to);
}

typedef struct {
  const request_t *request;
  int64_t next, count;
} queue_t;

static void serve(void *argument) {
  queue_t *queue = argument;
  const request_t *q = queue->request;
  int64_t D = q->head_dim, L = q->block_length, groups = q->per_channel ? D : L * q->groups;
  int64_t room = most(groups, L) + 2 * VL, elements = D * L + L + VL, total = 2 * elements + 10 * room + L + VL;
  void *memory;
  if (posix_memalign(&memory, 64, 4 * total + 4 * room + D * L + room + L + 64)) return;
  memset(memory, 0, 4 * total);
  work_t w = {.q = q};
  float *next = memory;
  w.tile = next, w.other = next += elements, next += elements;
  float **places[] = {&w.low, &w.high, &w.inverse, &w.start, &w.first, &w.step, &w.scale, &w.offset, &w.mid};
  for (unsigned i = 0; i < sizeof places / sizeof *places; i++) *places[i] = next, next += room;
  w.rounded = (int32_t *)next, next += L + VL;
  int32_t *to = (int32_t *)next;
  w.codes = (uint8_t *)(to + room), w.lost = w.codes + D * L, w.bytes = w.lost + room;
  for (int64_t i = 0; i < groups; i++) to[i] = (int32_t)(q->per_channel ? i : i % L * q->groups + i / L);
  for (;;) {
    int64_t item = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
    if (item >= queue->count) break;
    w.place = item;
    w.block = item % q->blocks;
    w.head = item / q->blocks % q->heads;
    w.row = item / (q->blocks * q->heads);
    serve_block(&w, groups, to);
  }
  free(memory);
}

/* Return 0, or 1 where no thread had memory; one that has serves the whole queue. */
int kvq_encode(const request_t *request) {
  queue_t queue = {request, 0, request->batch * request->heads * request->blocks};
  void (*run)(void (*)(void *), void *, unsigned, unsigned);
  *(void **)&run = request->run_parallel;
  if (run && request->threads > 1) run(serve, &queue, (unsigned)request->threads, 0);
  else serve(&queue);
  return queue.next < queue.count;
}

/* What structures.py compares with its own size. */
int64_t kvq_encode_size(void) { return sizeof(request_t); }
