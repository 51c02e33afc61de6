/* Attention over packed blocks for one layer: scales folded into query and probabilities, centred codes, fp32 sums, an
 * online softmax. Compiled on the machine that it runs on; the vector types are those of GCC and Clang, so any
 * processor gets its own width, and intrinsics only stand where a faster instruction exists, beside portable code.
 *
 * Words: a row is one query vector, R rows share a key-value head. A tile is the tokens that are weighed together, whole
 * blocks of both sides. Codes of a block are unpacked to int8 [outer][inner] as they lie: keys [D][L], values [L][D].
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#define MAX_ROWS 4   /* rows that a micro kernel keeps in registers */
#define MAX_VECTORS 4 /* vectors of the inner dimension that it keeps there too */
#define EXACT_TILE 64 /* tokens in full precision that are weighed together */

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int8_t vb __attribute__((vector_size(VL)));
typedef int8_t vb_any __attribute__((vector_size(VL), aligned(1), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t vh_any __attribute__((vector_size(2 * VL), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));

enum { F32 = 0, F16 = 1, BF16 = 2, BOOL = 3, U8 = 4, I8 = 5 }; /* U8: a scale; I8: a mid, see PackedFormat */
#define ZERO_SCALE 255
#define LOST_MID -128

/* These four structures are mirrored in structures.py; the fields must agree. */
typedef struct {
  const void *data; /* NULL: none */
  int64_t batch_stride, head_stride, token_stride, length;
} states_t;

typedef struct {
  const uint8_t *planes[3];
  const uint8_t *scale, *mid;
  const int8_t *exponent;
  const float *units; /* [2] for each block, the largest scale and the step of mids; NULL: they are no bytes */
  const uint8_t *factor; /* a code for each token; NULL: none */
  const int64_t *rows; /* row of the chunk for each row of the batch; NULL: as they are */
  int64_t used, capacity;
} segment_t;

typedef struct {
  const segment_t *segments;
  const int8_t *signs; /* of the rotation; NULL: none */
  const int32_t *sources; /* [heads][head_dim], the element of the query that meets a stored channel; NULL: its own */
  const float *factors; /* [256], what the codes of tokens and of scales stand for */
  int64_t segment_count, rotation_block;
  int64_t head_dim, states_dim; /* channels that are stored, elements of the states */
  int64_t block_length, group_length, groups; /* groups of one token; 1 per channel */
  int64_t bits, plane_count, widths[3];
  int64_t per_channel, scale_type, mid_type, shifts_mid;
} side_t;

typedef struct {
  side_t key, value;
  const void *query;
  int64_t query_strides[3]; /* batch, head, token */
  void *output;             /* [B, Tq, Hq, D_v] */
  states_t keys[3], values[3]; /* sinks, window, new */
  const int64_t *sink_starts;  /* [B] */
  const float *sink_logits;    /* [Hq]; NULL: none */
  const void *mask;            /* NULL: none */
  int64_t mask_strides[4];     /* batch, head, query, token */
  int64_t mask_type, is_causal;
  int64_t batch, heads, queries_per_head, queries;
  int64_t query_type, key_type, value_type; /* of query and output, of keys and of values in full precision */
  int64_t stored, tile_length, splits, threads;
  float scaling, softcap; /* softcap 0: none */
  float *partial_sums;    /* [B, H, splits, R, D_v]; unused with one split */
  float *partial_state;   /* [B, H, splits, R, 2]: largest score, sum of weights */
  int64_t *finished;      /* [B, H], zeros */
  void *run_parallel;     /* GOMP_parallel, or NULL: one thread */
} request_t;

static inline vf load(const float *p) { return *(const vf_any *)p; }
static inline void store(float *p, vf x) { *(vf_any *)p = x; }
static inline vf splat(float x) { return x - (vf){0}; }
static inline vf choose(vi condition, vf yes, vf no) { return (vf)(((vi)yes & condition) | ((vi)no & ~condition)); }

static inline vf load_codes(const int8_t *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  vb codes = *(const vb_any *)p;
  return __builtin_convertvector(__builtin_convertvector(codes, vi), vf);
#endif
}

static inline vf load_half(const uint16_t *p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__) && VL == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  vu wide = __builtin_convertvector(*(const vh_any *)p, vu);
  vu magnitude = (wide & 0x7fff) << 13;
  vf number = (vf)magnitude * 0x1p112f;
  vi special = (vi)magnitude >= 0x0f800000; /* infinite or NaN */
  number = choose(special, (vf)(magnitude | 0x7f800000u), number);
  return (vf)((vu)number | (wide & 0x8000) << 16);
#endif
}

static inline vf load_bfloat16(const uint16_t *p) {
  return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16);
}

static inline float half_to_float(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, bits;
  float number;
  memcpy(&number, &magnitude, 4);
  number *= 0x1p112f;
  memcpy(&bits, &number, 4);
  if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;
  bits |= (uint32_t)(h & 0x8000) << 16;
  memcpy(&number, &bits, 4);
  return number;
}

static inline float bfloat16_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float number;
  memcpy(&number, &bits, 4);
  return number;
}

static inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)(bits >> 16) | 0x40;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t float_to_half(float x) {
  uint32_t bits, sign, result;
  memcpy(&bits, &x, 4);
  sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00; /* rounds past the largest */
  if (bits < 0x38800000) {                      /* denormal: adding 0.5 lets the adder round */
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&result, &magnitude, 4);
    return sign | (result - 0x3f000000);
  }
  return sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

static inline int64_t size_of(int64_t type) { return type == F32 ? 4 : type == F16 || type == BF16 ? 2 : 1; }

/* Widen `count` numbers; may read and write up to a vector past the end, for which every buffer has room. */
static inline float widen_one(const void *from, int64_t type, int64_t index) {
  if (type == F32) return ((const float *)from)[index];
  uint16_t h = ((const uint16_t *)from)[index];
  return type == F16 ? half_to_float(h) : bfloat16_to_float(h);
}

static void widen(float *to, const void *from, int64_t type, int64_t count) {
  int64_t i = 0;
  if (type == F32) memcpy(to, from, 4 * count);
  else if (type == F16) {
    for (; i + VL <= count; i += VL) store(to + i, load_half((const uint16_t *)from + i));
    for (; i < count; i++) to[i] = half_to_float(((const uint16_t *)from)[i]);
  } else {
    for (; i + VL <= count; i += VL) store(to + i, load_bfloat16((const uint16_t *)from + i));
    for (; i < count; i++) to[i] = bfloat16_to_float(((const uint16_t *)from)[i]);
  }
}

static inline float sum_lanes(vf x) {
  float total = 0;
  for (int i = 0; i < VL; i++) total += x[i];
  return total;
}

static inline float sum_fast(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  return sum_lanes(x);
#endif
}

/* exp for x <= 0; 0 below the least normal number, NaN for NaN. Polynomial: Cephes' expf. */
static inline vf exponential(vf x) {
  vf n = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2 ** 23 rounds to the nearest integer */
  vi power = (vi)n - 0x4b400000;
  n = n - 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  y = y * (vf)((power + 127) << 23);
  return choose(x < -87.0f, (vf){0}, y);
}

static inline float dot(const float *a, const float *b, int64_t count) {
  vf total = {0};
  int64_t i = 0;
  for (; i + VL <= count; i += VL) total += load(a + i) * load(b + i);
  float sum = sum_fast(total);
  for (; i < count; i++) sum += a[i] * b[i];
  return sum;
}

static inline float dot_any(const float *a, const void *b, int64_t type, int64_t count) {
  vf one = {0}, two = {0};
  int64_t i = 0;
  const uint16_t *h = b;
  if (type == F32) return dot(a, b, count);
  if (type == F16)
    for (; i + 2 * VL <= count; i += 2 * VL) {
      one += load(a + i) * load_half(h + i);
      two += load(a + i + VL) * load_half(h + i + VL);
    }
  else
    for (; i + 2 * VL <= count; i += 2 * VL) {
      one += load(a + i) * load_bfloat16(h + i);
      two += load(a + i + VL) * load_bfloat16(h + i + VL);
    }
  float sum = sum_fast(one + two);
  for (; i < count; i++) sum += a[i] * widen_one(b, type, i);
  return sum;
}

/* The rotation of kvq/store/rotation.py without its signs: a Hadamard matrix over blocks, orthogonal. */
static void transform(float *x, int64_t dim, int64_t block) {
  for (int64_t start = 0; start < dim; start += block)
    for (int64_t span = 1; span < block; span *= 2)
      for (int64_t i = start; i < start + block; i += 2 * span)
        for (int64_t j = i; j < i + span; j++) {
          float low = x[j], high = x[j + span];
          x[j] = low + high;
          x[j + span] = low - high;
        }
  float scale = 1.0f / sqrtf((float)block);
  for (int64_t i = 0; i < dim; i++) x[i] *= scale;
}

/* ---- Micro kernels: sums[r][n] += a[r][k] * codes[k][n] for R rows and N vectors, k over `count`. Meanwhile memory is
 * asked for what stands at `ahead`, `pace` bytes an iteration: as many at once would stall as long as none at all. */

#define DEFINE_MICRO(NAME, TYPE, LOAD)                                                                               \
  static inline __attribute__((always_inline)) void NAME##_body(                                                     \
      const int R, const int N, const float *a, int64_t a_stride, int64_t count, const TYPE *codes, int64_t stride,  \
      float *sums, int64_t sums_stride, const uint8_t *ahead, int64_t pace) {                                        \
    vf total[MAX_ROWS][MAX_VECTORS];                                                                                 \
    for (int r = 0; r < R; r++)                                                                                      \
      for (int n = 0; n < N; n++) total[r][n] = (vf){0};                                                             \
    for (int64_t k = 0; k < count; k++) {                                                                            \
      vf code[MAX_VECTORS];                                                                                          \
      __builtin_prefetch(ahead + k * pace);                                                                          \
      for (int n = 0; n < N; n++) code[n] = LOAD(codes + k * stride + n * VL);                                       \
      for (int r = 0; r < R; r++) {                                                                                  \
        vf factor = splat(a[r * a_stride + k]);                                                                      \
        for (int n = 0; n < N; n++) total[r][n] += factor * code[n];                                                 \
      }                                                                                                              \
    }                                                                                                                \
    for (int r = 0; r < R; r++)                                                                                      \
      for (int n = 0; n < N; n++) store(sums + r * sums_stride + n * VL, total[r][n]);                               \
  }                                                                                                                  \
  static void NAME(int rows, int vectors, const float *a, int64_t a_stride, int64_t count, const TYPE *codes,        \
                   int64_t stride, float *sums, int64_t sums_stride, const uint8_t *ahead, int64_t pace) {           \
    switch (rows * 8 + vectors) {                                                                                    \
      MICRO_CASES(NAME)                                                                                              \
    }                                                                                                                \
  }
#define MICRO_CASE(NAME, R, N)                                                                                       \
  case R * 8 + N:                                                                                                    \
    NAME##_body(R, N, a, a_stride, count, codes, stride, sums, sums_stride, ahead, pace);                            \
    break;
#define MICRO_ROW(NAME, R) MICRO_CASE(NAME, R, 1) MICRO_CASE(NAME, R, 2) MICRO_CASE(NAME, R, 3) MICRO_CASE(NAME, R, 4)
#define MICRO_CASES(NAME) MICRO_ROW(NAME, 1) MICRO_ROW(NAME, 2) MICRO_ROW(NAME, 3) MICRO_ROW(NAME, 4)

DEFINE_MICRO(multiply_codes, int8_t, load_codes)
DEFINE_MICRO(multiply_states, float, load)

/* ---- Blocks */

/* Unpack N bytes of a plane: part p of each byte goes to `to + p * part_stride`. The bits of the plane stand `shift`
 * high in a code; the first plane overwrites what stood there, the last one subtracts `half`. */
#define DEFINE_UNPACK(N)                                                                                             \
  typedef uint8_t bytes_##N __attribute__((vector_size(N), aligned(1), may_alias));                                  \
  typedef uint64_t words_##N __attribute__((vector_size(N), aligned(1), may_alias));                                 \
  static inline __attribute__((always_inline)) void unpack_##N(const int width, int shift, int first, uint8_t half,  \
                                                               const uint8_t *from, uint8_t *to,                     \
                                                               int64_t part_stride) {                                \
    words_##N packed = *(const words_##N *)from;                                                                     \
    for (int part = 0; part < 8 / width; part++) {                                                                   \
      words_##N code = packed >> (part * width) & 0x0101010101010101u * (uint64_t)((1 << width) - 1);                \
      bytes_##N *place = (bytes_##N *)(to + part * part_stride);                                                     \
      if (shift) code <<= shift;                                                                                     \
      if (!first) code |= (words_##N)*place;                                                                         \
      *place = (bytes_##N)code - half;                                                                               \
    }                                                                                                                \
  }
DEFINE_UNPACK(8)
DEFINE_UNPACK(16)
DEFINE_UNPACK(32)
DEFINE_UNPACK(64)

static inline __attribute__((always_inline)) void unpack_runs(const int width, int shift, int first, uint8_t half,
                                                              const uint8_t *from, uint8_t *to, int64_t outer,
                                                              const int64_t run, int64_t outer_stride) {
  for (int64_t o = 0; o < outer; o++, from += run, to += outer_stride) {
    int64_t i = 0;
    for (; i + 64 <= run; i += 64) unpack_64(width, shift, first, half, from + i, to + i, run);
    if (i + 32 <= run) unpack_32(width, shift, first, half, from + i, to + i, run), i += 32;
    if (i + 16 <= run) unpack_16(width, shift, first, half, from + i, to + i, run), i += 16;
    if (i + 8 <= run) unpack_8(width, shift, first, half, from + i, to + i, run), i += 8;
    for (; i < run; i++)
      for (int part = 0; part < 8 / width; part++) {
        uint8_t *place = to + i + part * run, code = from[i] >> (part * width) & ((1 << width) - 1);
        *place = (uint8_t)((first ? 0 : *place) | code << shift) - half;
      }
  }
}

/* One plane of a block. Keys: D runs of L * width / 8 bytes, the parts of a run as many codes apart. Values: the parts
 * are L * width / 8 tokens, of D codes each, apart, so a block is one long run. */
static void unpack_plane(const side_t *side, int is_key, int64_t width, int shift, uint8_t half, const uint8_t *packed,
                         int8_t *codes) {
  int64_t L = side->block_length, D = side->head_dim, bytes = L * width / 8;
  int64_t outer = is_key ? D : 1, run = is_key ? bytes : bytes * D;
  uint8_t *to = (uint8_t *)codes;
  if (width == 4 && run == 32) unpack_runs(4, shift, shift == 0, half, packed, to, outer, 32, L);
  else if (width == 2 && run == 16) unpack_runs(2, shift, shift == 0, half, packed, to, outer, 16, L);
  else if (width == 1 && run == 8) unpack_runs(1, shift, shift == 0, half, packed, to, outer, 8, L);
  else if (width == 4) unpack_runs(4, shift, shift == 0, half, packed, to, outer, run, L);
  else if (width == 2) unpack_runs(2, shift, shift == 0, half, packed, to, outer, run, L);
  else if (width == 1) unpack_runs(1, shift, shift == 0, half, packed, to, outer, run, L);
  else unpack_runs(8, 0, 1, half, packed, to, 1, L * D, 0);
}

typedef struct {
  int64_t segment, block; /* the next block */
} cursor_t;

static cursor_t seek(const side_t *side, int64_t block) {
  cursor_t cursor = {0, block};
  while (cursor.segment < side->segment_count && cursor.block >= side->segments[cursor.segment].used)
    cursor.block -= side->segments[cursor.segment++].used;
  return cursor;
}

typedef struct {
  int8_t *codes;
  float *scale, *mid; /* per channel [D], per token [groups][L] */
  const uint8_t *factor; /* [L], codes; NULL: none */
  const uint8_t *ahead; /* the widest plane of the block behind, which is fetched while this one is multiplied */
  int64_t ahead_bytes;
} block_t;

/* Widen scales or mids, which may be bytes. */
static void widen_numbers(float *to, const uint8_t *from, int64_t type, int64_t count, const side_t *side) {
  const int8_t *mids = (const int8_t *)from;
  if (type == U8)
    for (int64_t i = 0; i < count; i++) to[i] = from[i] == ZERO_SCALE ? 0.0f : side->factors[from[i]];
  else if (type == I8)
    for (int64_t i = 0; i < count; i++) to[i] = mids[i] == LOST_MID ? NAN : (float)mids[i];
  else widen(to, from, type, count);
}

static void read_numbers(float *to, const uint8_t *from, int64_t type, const side_t *side, float factor) {
  if (side->per_channel || side->groups == 1) {
    int64_t count = side->per_channel ? side->head_dim : side->block_length;
    widen_numbers(to, from, type, count, side);
    if (factor != 1.0f)
      for (int64_t i = 0; i < count; i++) to[i] *= factor;
    return;
  }
  int64_t L = side->block_length, groups = side->groups;
  float *wide = to + L * groups + VL;
  widen_numbers(wide, from, type, L * groups, side);
  if (groups == 2) {
    for (int64_t t = 0; t < L; t++) {
      to[t] = wide[2 * t] * factor;
      to[L + t] = wide[2 * t + 1] * factor;
    }
    return;
  }
  for (int64_t g = 0; g < groups; g++)
    for (int64_t t = 0; t < L; t++) to[g * L + t] = wide[t * groups + g] * factor;
}

/* Read the block under the cursor, for a row of the batch and a head, and move on. */
static void read_block(const side_t *side, int is_key, cursor_t *cursor, int64_t row, int64_t head, int64_t heads,
                       block_t *block) {
  const segment_t *segment = side->segments + cursor->segment;
  int64_t from = segment->rows ? segment->rows[row] : row;
  int64_t place = (from * heads + head) * segment->capacity + cursor->block;
  int64_t L = side->block_length, D = side->head_dim, numbers = side->per_channel ? D : L * side->groups;
  int shift = 0;
  for (int64_t p = 0; p < side->plane_count; p++) {
    int64_t width = side->widths[p];
    uint8_t half = p + 1 == side->plane_count ? (uint8_t)(1 << (side->bits - 1)) : 0;
    int64_t bytes = L * width / 8 * D;
    const uint8_t *packed = segment->planes[p] + place * bytes;
    if (p == 0) block->ahead = packed + bytes, block->ahead_bytes = bytes;
    unpack_plane(side, is_key, width, shift, half, packed, block->codes);
    shift += (int)width;
  }
  block->factor = segment->factor ? segment->factor + place * L : NULL;
  float scale_unit = segment->exponent ? ldexpf(1.0f, segment->exponent[place]) : 1.0f;
  float mid_unit = side->shifts_mid ? scale_unit : 1.0f;
  if (segment->units) scale_unit = segment->units[2 * place], mid_unit = segment->units[2 * place + 1];
  read_numbers(block->scale, segment->scale + place * numbers * size_of(side->scale_type), side->scale_type, side,
               scale_unit);
  read_numbers(block->mid, segment->mid + place * numbers * size_of(side->mid_type), side->mid_type, side, mid_unit);
  if (++cursor->block == segment->used) cursor->segment++, cursor->block = 0;
}

/* ---- One key-value head of one row of the batch */

typedef struct {
  const request_t *q;
  int64_t row, head, rows; /* rows: R */
  int64_t score_stride;
  float *query, *rotated, *query_sums; /* [R][D], [R][D], [R][groups] */
  float *folded;                       /* [MAX_ROWS][max(D, L)] */
  float *sums;                         /* [MAX_ROWS][MAX_VECTORS * VL] */
  float *scores;                       /* [R][score_stride] */
  float *stored_sum, *exact_sum;       /* [R][D_v] */
  float *largest, *total;              /* [R] */
  float *states;                       /* [EXACT_TILE][D_v] */
  block_t block;
} work_t;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Multiply what the rows have for each token of a block, scores or weights, by the token's factor. */
static void apply_factors(work_t *w, const side_t *side, int64_t offset) {
  if (!w->block.factor) return;
  for (int64_t t = 0; t < side->block_length; t++) w->folded[t] = side->factors[w->block.factor[t]];
  for (int64_t r = 0; r < w->rows; r++) {
    float *numbers = w->scores + r * w->score_stride + offset;
    for (int64_t t = 0; t < side->block_length; t++) numbers[t] *= w->folded[t];
  }
}

static void score_block(work_t *w, const float *query, int64_t offset) {
  const side_t *side = &w->q->key;
  const block_t *block = &w->block;
  int64_t L = side->block_length, D = side->head_dim, G = side->group_length;
  int64_t pace = block->ahead_bytes / D;
  for (int64_t first = 0; first < w->rows; first += MAX_ROWS) {
    int rows = (int)least(MAX_ROWS, w->rows - first);
    const float *q = query + first * D;
    float constant[MAX_ROWS];
    if (side->per_channel)
      for (int r = 0; r < rows; r++) {
        float *folded = w->folded + r * D;
        vf total = {0};
        int64_t d = 0;
        for (; d + VL <= D; d += VL) {
          vf one = load(q + r * D + d);
          store(folded + d, one * load(block->scale + d));
          total += one * load(block->mid + d);
        }
        constant[r] = sum_fast(total);
        for (; d < D; d++) {
          folded[d] = q[r * D + d] * block->scale[d];
          constant[r] += q[r * D + d] * block->mid[d];
        }
      }
    for (int64_t t = 0; t < L; t += MAX_VECTORS * VL) {
      int64_t tokens = least(MAX_VECTORS * VL, L - t);
      int vectors = (int)((tokens + VL - 1) / VL);
      for (int64_t g = 0; g < side->groups; g++) {
        int64_t start = g * G, count = side->per_channel ? D : least(G, D - start);
        const float *a = side->per_channel ? w->folded : q + start;
        multiply_codes(rows, vectors, a, D, count, block->codes + start * L + t, L, w->sums, MAX_VECTORS * VL,
                       block->ahead + start * pace, pace);
        for (int r = 0; r < rows; r++) {
          float *scores = w->scores + (first + r) * w->score_stride + offset + t;
          const float *sums = w->sums + r * MAX_VECTORS * VL;
          if (side->per_channel) {
            for (int64_t i = 0; i < tokens; i++) scores[i] = sums[i] + constant[r];
            continue;
          }
          const float *scale = block->scale + g * L + t, *mid = block->mid + g * L + t;
          float query_sum = w->query_sums[(first + r) * side->groups + g];
          if (g == 0)
            for (int64_t i = 0; i < tokens; i++) scores[i] = sums[i] * scale[i] + mid[i] * query_sum;
          else
            for (int64_t i = 0; i < tokens; i++) scores[i] += sums[i] * scale[i] + mid[i] * query_sum;
        }
      }
    }
  }
}

static void mix_block(work_t *w, int64_t offset) {
  const side_t *side = &w->q->value;
  const block_t *block = &w->block;
  int64_t L = side->block_length, D = side->head_dim, groups = side->per_channel ? 1 : side->groups;
  int64_t G = side->per_channel ? D : side->group_length;
  int64_t strips = (D + MAX_VECTORS * VL - 1) / (MAX_VECTORS * VL), pace = block->ahead_bytes / (strips * L);
  for (int64_t first = 0; first < w->rows; first += MAX_ROWS) {
    int rows = (int)least(MAX_ROWS, w->rows - first);
    const float *weights = w->scores + first * w->score_stride + offset;
    for (int64_t g = 0; g < groups; g++) {
      float constant[MAX_ROWS];
      const float *a = weights;
      int64_t a_stride = w->score_stride;
      for (int r = 0; r < rows; r++) {
        const float *p = weights + r * w->score_stride;
        if (side->per_channel) {
          vf total = {0};
          int64_t t = 0;
          for (; t + VL <= L; t += VL) total += load(p + t);
          constant[r] = sum_fast(total);
          for (; t < L; t++) constant[r] += p[t];
          continue;
        }
        const float *scale = block->scale + g * L, *mid = block->mid + g * L;
        float *folded = w->folded + r * L;
        vf total = {0};
        int64_t t = 0;
        for (; t + VL <= L; t += VL) {
          vf one = load(p + t);
          store(folded + t, one * load(scale + t));
          total += one * load(mid + t);
        }
        constant[r] = sum_fast(total);
        for (; t < L; t++) {
          folded[t] = p[t] * scale[t];
          constant[r] += p[t] * mid[t];
        }
      }
      if (!side->per_channel) a = w->folded, a_stride = L;
      int64_t end = least(D, (g + 1) * G);
      for (int64_t d = g * G; d < end; d += MAX_VECTORS * VL) {
        int64_t channels = least(MAX_VECTORS * VL, end - d);
        int vectors = (int)((channels + VL - 1) / VL);
        multiply_codes(rows, vectors, a, a_stride, L, block->codes + d, D, w->sums, MAX_VECTORS * VL,
                       block->ahead + d / (MAX_VECTORS * VL) * L * pace, pace);
        for (int r = 0; r < rows; r++) {
          float *out = w->stored_sum + (first + r) * D + d;
          const float *sums = w->sums + r * MAX_VECTORS * VL;
          if (side->per_channel)
            for (int64_t i = 0; i < channels; i++)
              out[i] += sums[i] * block->scale[d + i] + block->mid[d + i] * constant[r];
          else
            for (int64_t i = 0; i < channels; i++) out[i] += sums[i] + constant[r];
        }
      }
    }
  }
}

/* Add the mask to the scores of one row of tokens from `position` on. */
static void mask_scores(const work_t *w, int64_t r, float *scores, int64_t position, int64_t count) {
  const request_t *q = w->q;
  int64_t query = r % q->queries, query_head = w->head * q->queries_per_head + r / q->queries;
  if (!q->mask) {
    int64_t seen = q->stored + q->keys[1].length + q->keys[2].length - q->queries + query + 1;
    if (q->is_causal)
      for (int64_t i = most(0, seen - position); i < count; i++) scores[i] = -INFINITY;
    return;
  }
  int64_t start = w->row * q->mask_strides[0] + query_head * q->mask_strides[1] + query * q->mask_strides[2] +
                  position * q->mask_strides[3];
  int64_t step = q->mask_strides[3];
  if (q->mask_type == BOOL) {
    const uint8_t *mask = (const uint8_t *)q->mask + start;
    if (step == 1)
      for (int64_t i = 0; i < count; i++) scores[i] = mask[i] ? scores[i] : -INFINITY;
    else
      for (int64_t i = 0; i < count; i++) scores[i] = mask[i * step] ? scores[i] : -INFINITY;
  } else
    for (int64_t i = 0; i < count; i++) scores[i] += widen_one(q->mask, q->mask_type, start + i * step);
}

/* Turn the scores of a tile into weights, and shrink the earlier sums to the new largest score. */
static void weigh(work_t *w, int64_t position, int64_t count, int64_t hidden_start, int64_t hidden_end) {
  const request_t *q = w->q;
  int64_t Dv = q->value.head_dim;
  for (int64_t r = 0; r < w->rows; r++) {
    float *scores = w->scores + r * w->score_stride;
    if (q->softcap != 0)
      for (int64_t i = 0; i < count; i++) scores[i] = q->softcap * tanhf(scores[i] / q->softcap);
    if (q->mask || q->is_causal) mask_scores(w, r, scores, position, count);
    for (int64_t i = hidden_start; i < hidden_end; i++) scores[i] = -INFINITY;
    for (int64_t i = count; i % VL; i++) scores[i] = -INFINITY;
    vf highest = splat(w->largest[r]);
    for (int64_t i = 0; i < count; i += VL) {
      vf one = load(scores + i);
      highest = choose(one > highest, one, highest);
    }
    float largest = w->largest[r];
    for (int i = 0; i < VL; i++) largest = highest[i] > largest ? highest[i] : largest;
    float base = largest == -INFINITY ? 0.0f : largest;
    if (largest != w->largest[r]) {
      float factor = expf(w->largest[r] - base);
      w->total[r] *= factor;
      for (int64_t d = 0; d < Dv; d++) {
        w->stored_sum[r * Dv + d] *= factor;
        w->exact_sum[r * Dv + d] *= factor;
      }
      w->largest[r] = largest;
    }
    vf total = {0};
    for (int64_t i = 0; i < count; i += VL) {
      vf weight = exponential(load(scores + i) - base);
      store(scores + i, weight);
      total += weight;
    }
    w->total[r] += sum_fast(total);
  }
}

static void attend_tile(work_t *w, cursor_t *keys, cursor_t *values, int64_t position) {
  const request_t *q = w->q;
  int64_t count = least(q->tile_length, q->stored - position);
  for (int64_t t = 0; t < count; t += q->key.block_length) {
    read_block(&q->key, 1, keys, w->row, w->head, q->heads, &w->block);
    score_block(w, w->rotated, t);
    apply_factors(w, &q->key, t);
  }
  int64_t start = 0, end = 0;
  if (q->keys[0].data) {
    start = least(count, most(0, q->sink_starts[w->row] - position));
    end = least(count, most(0, q->sink_starts[w->row] + q->keys[0].length - position));
  }
  weigh(w, position, count, start, end);
  for (int64_t t = 0; t < count; t += q->value.block_length) {
    read_block(&q->value, 0, values, w->row, w->head, q->heads, &w->block);
    apply_factors(w, &q->value, t);
    mix_block(w, t);
  }
}

static const uint8_t *token_at(const work_t *w, const states_t *states, int64_t type, int64_t token) {
  int64_t size = size_of(type);
  return (const uint8_t *)states->data +
         size * (w->row * states->batch_stride + w->head * states->head_stride + token * states->token_stride);
}

static void attend_exact(work_t *w, const states_t *keys, const states_t *values, int64_t position, int64_t length) {
  const request_t *q = w->q;
  int64_t D = q->key.states_dim, Dv = q->value.head_dim;
  for (int64_t start = 0; start < length; start += EXACT_TILE) {
    int64_t count = least(EXACT_TILE, length - start);
    for (int64_t t = 0; t < count; t++) {
      const uint8_t *key = token_at(w, keys, q->key_type, start + t);
      for (int64_t r = 0; r < w->rows; r++)
        w->scores[r * w->score_stride + t] = dot_any(w->query + r * D, key, q->key_type, D);
    }
    weigh(w, position + start, count, 0, 0);
    for (int64_t t = 0; t < count; t++)
      widen(w->states + t * Dv, token_at(w, values, q->value_type, start + t), q->value_type, Dv);
    for (int64_t first = 0; first < w->rows; first += MAX_ROWS) {
      int rows = (int)least(MAX_ROWS, w->rows - first);
      for (int64_t d = 0; d < Dv; d += MAX_VECTORS * VL) {
        int64_t channels = least(MAX_VECTORS * VL, Dv - d);
        int vectors = (int)((channels + VL - 1) / VL);
        multiply_states(rows, vectors, w->scores + first * w->score_stride, w->score_stride, count, w->states + d, Dv,
                        w->sums, MAX_VECTORS * VL, (const uint8_t *)w->states, 0);
        for (int r = 0; r < rows; r++)
          for (int64_t i = 0; i < channels; i++)
            w->exact_sum[(first + r) * Dv + d + i] += w->sums[r * MAX_VECTORS * VL + i];
      }
    }
  }
}

static void start_head(work_t *w, int is_first) {
  const request_t *q = w->q;
  const side_t *side = &q->key;
  int64_t D = side->states_dim, stored = side->head_dim, Dv = q->value.head_dim, size = size_of(q->query_type);
  const int32_t *sources = side->sources ? side->sources + w->head * stored : NULL;
  for (int64_t r = 0; r < w->rows; r++) {
    int64_t query_head = w->head * q->queries_per_head + r / q->queries;
    float *query = w->query + r * D, *rotated = w->rotated + r * stored;
    widen(query, (const uint8_t *)q->query + size * (w->row * q->query_strides[0] + query_head * q->query_strides[1] +
                                                     r % q->queries * q->query_strides[2]), q->query_type, D);
    for (int64_t d = 0; d < D; d++) query[d] *= q->scaling;
    for (int64_t d = 0; d < stored; d++) {
      float number = query[sources ? sources[d] : d];
      rotated[d] = side->signs ? number * side->signs[d] : number;
    }
    if (side->signs) transform(rotated, stored, side->rotation_block);
    if (!side->per_channel)
      for (int64_t g = 0; g < side->groups; g++) {
        float sum = 0;
        for (int64_t d = g * side->group_length; d < least(stored, (g + 1) * side->group_length); d++) sum += rotated[d];
        w->query_sums[r * side->groups + g] = sum;
      }
    int has_logit = is_first && q->sink_logits;
    w->largest[r] = has_logit ? q->sink_logits[query_head] : -INFINITY;
    w->total[r] = has_logit ? 1.0f : 0.0f;
  }
  memset(w->stored_sum, 0, 4 * w->rows * Dv);
  memset(w->exact_sum, 0, 4 * w->rows * Dv);
}

static void write_row(const request_t *q, int64_t row, int64_t head, int64_t r, const float *sum, float total) {
  int64_t Dv = q->value.head_dim, query_heads = q->heads * q->queries_per_head;
  int64_t query_head = head * q->queries_per_head + r / q->queries;
  int64_t place = ((row * q->queries + r % q->queries) * query_heads + query_head) * Dv;
  float factor = total == 0 ? 0.0f : 1.0f / total;
  if (q->query_type == F32)
    for (int64_t d = 0; d < Dv; d++) ((float *)q->output)[place + d] = sum[d] * factor;
  else if (q->query_type == F16)
    for (int64_t d = 0; d < Dv; d++) ((uint16_t *)q->output)[place + d] = float_to_half(sum[d] * factor);
  else
    for (int64_t d = 0; d < Dv; d++) ((uint16_t *)q->output)[place + d] = float_to_bfloat16(sum[d] * factor);
}

static void merge_splits(const request_t *q, int64_t row, int64_t head, int64_t R, float *sum) {
  int64_t Dv = q->value.head_dim, first = (row * q->heads + head) * q->splits;
  for (int64_t r = 0; r < R; r++) {
    float largest = -INFINITY, total = 0;
    for (int64_t s = 0; s < q->splits; s++) {
      float other = q->partial_state[((first + s) * R + r) * 2];
      largest = other > largest ? other : largest;
    }
    memset(sum, 0, 4 * Dv);
    for (int64_t s = 0; s < q->splits; s++) {
      const float *state = q->partial_state + ((first + s) * R + r) * 2;
      const float *part = q->partial_sums + ((first + s) * R + r) * Dv;
      float factor = state[0] == -INFINITY ? (state[1] == state[1] ? 0.0f : NAN) : expf(state[0] - largest);
      total += factor * state[1];
      for (int64_t d = 0; d < Dv; d++) sum[d] += factor * part[d];
    }
    write_row(q, row, head, r, sum, total);
  }
}

/* Undo the rotation of the stored values and add the exact ones; the result is in `stored_sum`. */
static void finish_head(work_t *w) {
  const side_t *side = &w->q->value;
  int64_t Dv = side->head_dim;
  for (int64_t r = 0; r < w->rows; r++) {
    float *sum = w->stored_sum + r * Dv;
    if (side->signs) {
      transform(sum, Dv, side->rotation_block);
      for (int64_t d = 0; d < Dv; d++) sum[d] *= side->signs[d];
    }
    for (int64_t d = 0; d < Dv; d++) sum[d] += w->exact_sum[r * Dv + d];
  }
}

static void attend_split(work_t *w, int64_t split) {
  const request_t *q = w->q;
  int64_t tiles = (q->stored + q->tile_length - 1) / q->tile_length;
  int64_t first = tiles * split / q->splits, last = tiles * (split + 1) / q->splits, R = w->rows;
  int64_t Dv = q->value.head_dim;
  start_head(w, split == 0);
  if (first < last) {
    cursor_t keys = seek(&q->key, first * q->tile_length / q->key.block_length);
    cursor_t values = seek(&q->value, first * q->tile_length / q->value.block_length);
    for (int64_t tile = first; tile < last; tile++) attend_tile(w, &keys, &values, tile * q->tile_length);
  }
  if (split == q->splits - 1) {
    if (q->keys[0].data) {
      int64_t start = q->sink_starts[w->row];
      attend_exact(w, &q->keys[0], &q->values[0], start, least(q->keys[0].length, most(0, q->stored - start)));
    }
    attend_exact(w, &q->keys[1], &q->values[1], q->stored, q->keys[1].length);
    attend_exact(w, &q->keys[2], &q->values[2], q->stored + q->keys[1].length, q->keys[2].length);
  }
  finish_head(w);
  if (q->splits == 1) {
    for (int64_t r = 0; r < R; r++) write_row(q, w->row, w->head, r, w->stored_sum + r * Dv, w->total[r]);
    return;
  }
  int64_t place = (w->row * q->heads + w->head) * q->splits + split;
  memcpy(q->partial_sums + place * R * Dv, w->stored_sum, 4 * R * Dv);
  for (int64_t r = 0; r < R; r++) {
    q->partial_state[(place * R + r) * 2] = w->largest[r];
    q->partial_state[(place * R + r) * 2 + 1] = w->total[r];
  }
  if (__atomic_add_fetch(q->finished + w->row * q->heads + w->head, 1, __ATOMIC_ACQ_REL) == q->splits)
    merge_splits(q, w->row, w->head, R, w->exact_sum);
}

typedef struct {
  const request_t *request;
  int64_t next, count;
} queue_t;

static void serve(void *argument) {
  queue_t *queue = argument;
  const request_t *q = queue->request;
  int64_t R = q->queries_per_head * q->queries, D = q->key.head_dim, Dv = q->value.head_dim;
  int64_t L = most(q->key.block_length, q->value.block_length), groups = most(q->key.groups, q->value.groups);
  int64_t stride = most(q->tile_length, EXACT_TILE) + MAX_VECTORS * VL, numbers = most(most(D, Dv), 2 * L * groups);
  int64_t widest = most(most(D, Dv), L) + VL;
  int64_t floats[] = {R * D, R * D, R * groups, MAX_ROWS * widest, MAX_ROWS * MAX_VECTORS * VL, R * stride, R * Dv,
                      R * Dv, R, R, EXACT_TILE * Dv, numbers, numbers};
  int64_t total = 0, count = sizeof floats / sizeof *floats;
  for (int64_t i = 0; i < count; i++) total += (floats[i] = (floats[i] + MAX_VECTORS * VL + 15) / 16 * 16);
  void *memory;
  if (posix_memalign(&memory, 64, 4 * total + L * most(D, Dv) + MAX_VECTORS * VL)) return;
  work_t w = {.q = q, .rows = R, .score_stride = stride};
  float **places[] = {&w.query, &w.rotated, &w.query_sums, &w.folded, &w.sums, &w.scores, &w.stored_sum, &w.exact_sum,
                      &w.largest, &w.total, &w.states, &w.block.scale, &w.block.mid};
  float *next = memory;
  for (int64_t i = 0; i < count; i++) *places[i] = next, next += floats[i];
  w.block.codes = (int8_t *)next;
  for (;;) {
    int64_t item = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
    if (item >= queue->count) break;
    w.row = item / (q->heads * q->splits);
    w.head = item / q->splits % q->heads;
    attend_split(&w, item % q->splits);
  }
  free(memory);
}

/* Return 0, or 1 where no thread had memory; one that has serves the whole queue. */
int kvq_attend(const request_t *request) {
  queue_t queue = {request, 0, request->batch * request->heads * request->splits};
  void (*run)(void (*)(void *), void *, unsigned, unsigned);
  *(void **)&run = request->run_parallel;
  if (run && request->threads > 1) run(serve, &queue, (unsigned)request->threads, 0);
  else serve(&queue);
  return queue.next < queue.count;
}

/* What structures.py compares with its own sizes. */
int64_t kvq_sizes(int64_t which) {
  int64_t sizes[] = {sizeof(states_t), sizeof(segment_t), sizeof(side_t), sizeof(request_t)};
  return sizes[which];
}
