/* Attention over packed blocks for one layer: scales folded into query and probabilities, centred codes, an online
 * softmax. Compiled on the machine that it runs on; the vector types are those of GCC and Clang, so any processor gets
 * its own width, and intrinsics only stand where a faster instruction exists, beside portable code.
 *
 * On x86, and on ARM with dot products, codes stay whole numbers: see "Whole numbers". Elsewhere they are widened to
 * fp32.
 *
 * Words: a row is one query vector, R rows share a key-value head. A tile is the tokens that are weighed together,
 * whole blocks of both sides. Codes of a block are unpacked [outer][inner] as they lie: keys [D][L], values [L][D].
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__) || defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define DOT_PRODUCTS
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#if defined(KVQ_WIDEN_CODES) /* for tests: as on other processors */
#elif defined(DOT_PRODUCTS)
#define WHOLE_BYTES 16 /* of a vector of whole numbers */
#define TOGETHER 4     /* rows of codes that an instruction multiplies and adds up */
#elif defined(__AVX512BW__)
#define WHOLE_BYTES 64
#elif defined(__AVX2__)
#define WHOLE_BYTES 32
#elif defined(__SSE2__)
#define WHOLE_BYTES 16
#endif
#if defined(WHOLE_BYTES) && !defined(TOGETHER)
#define TOGETHER 2
#endif
#define LINE_BYTES 64 /* that memory is asked for together */
#define MAX_ROWS 4 /* rows that a micro kernel keeps in registers */
#if defined(__SSE2__) && !defined(__AVX512F__)
#define MAX_VECTORS 2 /* vectors of the inner dimension that it keeps there too; there are 16 registers */
#else
#define MAX_VECTORS 4
#endif
#define UNROLLED _Pragma("GCC unroll 8") /* or sums would not stay in registers */
#define STORED_TILE 256 /* tokens that are weighed together, about: stored ones, and ones in full precision */
#define EXACT_TILE 64

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
  const float *levels; /* [2 ** bits], what codes stand for; NULL: themselves, less the middle of their range */
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

#if !defined(WHOLE_BYTES)
static inline vf load_codes(const int8_t *p) {
  vb codes = *(const vb_any *)p;
  return __builtin_convertvector(__builtin_convertvector(codes, vi), vf);
}
#endif

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
#elif defined(__SSE2__)
#if VL == 8
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  __m128 four = (__m128)x;
#endif
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
  return sum_lanes(x);
#endif
}

/* The larger of each two; `a` where one is NaN. */
static inline vf larger_float(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)b, (__m256)a);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)b, (__m128)a);
#else
  return choose(b > a, b, a);
#endif
}

static inline float largest_lane(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__SSE2__)
#if VL == 8
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  __m128 four = (__m128)x;
#endif
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
  float largest = x[0];
  for (int i = 1; i < VL; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

static inline int32_t sum_whole(vi x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#elif VL == 8 && defined(__AVX2__)
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
#else
  uint32_t total = 0;
  for (int i = 0; i < VL; i++) total += (uint32_t)x[i];
  return (int32_t)total;
#endif
}

static inline vi larger(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  vi is_larger = a > b;
  return (a & is_larger) | (b & ~is_larger);
#endif
}

/* exp for x <= 0; 0 below the least normal number, NaN for NaN. The polynomial is 2 ** x within 0.5 of 0 with the least
 * relative error that its degree allows, 7.5e-8; summed in few steps, each of which waits for the one before. */
static inline vf exponential(vf x) {
  const float magic = 12582912.0f + 127.0f; /* 1.5 * 2 ** 23 rounds to the nearest integer, 127 is the exponent of 1 */
  vf shifted = x * 1.44269504088896341f + magic;
  vf r = x * 1.44269504088896341f - (shifted - magic), squared = r * r;
  vf low = 0.693146967f * r + 1.00000007f, middle = 0.0555071327f * r + 0.240221197f;
  vf high = 0.0013276472f * r + 0.00967554133f;
  vf y = ((high * squared + middle) * squared + low) * (vf)((vi)shifted << 23);
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
#if MAX_VECTORS == 2
#define MICRO_ROW(NAME, R) MICRO_CASE(NAME, R, 1) MICRO_CASE(NAME, R, 2)
#else
#define MICRO_ROW(NAME, R) MICRO_CASE(NAME, R, 1) MICRO_CASE(NAME, R, 2) MICRO_CASE(NAME, R, 3) MICRO_CASE(NAME, R, 4)
#endif
#define MICRO_CASES(NAME) MICRO_ROW(NAME, 1) MICRO_ROW(NAME, 2) MICRO_ROW(NAME, 3) MICRO_ROW(NAME, 4)

#if !defined(WHOLE_BYTES)
DEFINE_MICRO(multiply_codes, int8_t, load_codes)
#endif
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
#if defined(WHOLE_BYTES)
#define WIDEST_UNPACK WHOLE_BYTES /* compilers take wider ones apart by way of memory */
#else
#define WIDEST_UNPACK 64
#endif

static inline __attribute__((always_inline)) void unpack_runs(const int width, int shift, int first, uint8_t half,
                                                              const uint8_t *from, uint8_t *to, int64_t outer,
                                                              const int64_t run, int64_t outer_stride) {
  for (int64_t o = 0; o < outer; o++, from += run, to += outer_stride) {
    int64_t i = 0;
    if (WIDEST_UNPACK == 64)
      for (; i + 64 <= run; i += 64) unpack_64(width, shift, first, half, from + i, to + i, run);
    if (WIDEST_UNPACK >= 32)
      for (; i + 32 <= run; i += 32) unpack_32(width, shift, first, half, from + i, to + i, run);
    for (; i + 16 <= run; i += 16) unpack_16(width, shift, first, half, from + i, to + i, run);
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
  float *levels; /* [chunks][outer][CHUNK], what the codes stand for, where a codebook says so */
  float *scale, *mid; /* per channel [D], per token [groups][L] */
  float *factor; /* [L] */
  int has_factor;
  const uint8_t *ahead; /* the widest plane of the block behind, which is fetched while this one is multiplied */
  int64_t pace; /* bytes of it for each pass of a loop over the codes */
#if defined(WHOLE_BYTES)
  const uint8_t *rows; /* see layout_t */
#endif
} block_t;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Columns that are multiplied together. */
#if defined(WHOLE_BYTES)
#define CHUNK WHOLE_BYTES
#else
#define CHUNK (MAX_VECTORS * VL)
#endif

/* Columns of a block that are multiplied one after another: all of them, or those of a group. */
static inline int64_t count_columns(const side_t *side, int is_key) {
  if (is_key) return side->block_length;
  return side->per_channel ? side->head_dim : side->group_length;
}

static inline int64_t count_chunks(const side_t *side, int is_key) {
  int64_t inner = is_key ? side->block_length : side->head_dim, columns = count_columns(side, is_key);
  return divide_up(inner, columns) * divide_up(columns, CHUNK);
}

#if defined(WHOLE_BYTES)
/* ---- Whole numbers: products of codes with numbers that were rounded to 16 bits and a step.
 *
 * On x86 one instruction multiplies 16-bit numbers and adds two neighbours into 32 bits, so codes of two successive
 * places of the outer dimension are put beside each other. On ARM it multiplies bytes and adds four; a number is two
 * bytes there, the higher and the lower ones have sums of their own, and codes of four places are put together.
 *
 * Codes are taken from rows of packed bytes while they are multiplied, for all rows of numbers at once: rows are
 * interleaved, then shifted and masked. WHOLE_BYTES columns, a "chunk", make four vectors. On ARM these are in order.
 * On x86 rows are interleaved by words, of two columns each: of every 16 columns the first vector has the even ones
 * among the lower 8, the second the odd ones, and the others those of the upper 8. `order_sums` brings them into order.
 *
 * Numbers are at most 32767, codes less their half at most 128, and at most 512 products are summed: below 2 ** 31.
 * Codes are kept unsigned, and the sum starts with what the halves come to; on its way it may wrap around, as unsigned
 * numbers do, and the end undoes that. Only 8 bits have their half taken off on ARM, whose bytes are signed.
 *
 * Rounding leaves remainders, random from number to number. Codes less their half are -0.5 on average, so the sum of
 * the remainders of a row is brought in by that: it would be an error that all columns share, and turning back a
 * rotation would gather it in one channel. What is left is as random as the codes. Where it would show, the remainders
 * are rounded to 16 bits as well and multiplied too: a second "layer". */

#define MAX_SUMMED 512
#if TOGETHER == 4
#define LARGEST 32639.0f /* 127 * 256 + 127 */
#define SUMMED_VECTORS 2 /* vectors of a chunk that are summed at a time; each has two sums for a row */
#else
#define LARGEST 32767.0f
#define SUMMED_VECTORS MAX_VECTORS
#endif
#define VECTORS 4 /* of a chunk */
#define LAYERS 2
#define LARGEST_COARSE 3.0f /* error of a score, in accepted ones, beyond which it is refined in any case */
#define LANES (WHOLE_BYTES / 4)
#define REMAINDER_STEPS 65000.0f /* of the first step; no remainder rounds past LARGEST */

typedef uint32_t wu __attribute__((vector_size(WHOLE_BYTES), may_alias));
typedef uint32_t wu_any __attribute__((vector_size(WHOLE_BYTES), aligned(1), may_alias));

#if TOGETHER == 2
typedef uint32_t two_numbers __attribute__((aligned(2), may_alias));
typedef int16_t vs __attribute__((vector_size(2 * VL)));
typedef int16_t vs_any __attribute__((vector_size(2 * VL), aligned(2), may_alias));
#endif

#if TOGETHER == 4
typedef int64_t two_words __attribute__((vector_size(WHOLE_BYTES)));
#elif WHOLE_BYTES == 64
#define WHOLE(NAME, A, B) (wu)_mm512_##NAME((__m512i)(A), (__m512i)(B))
#elif WHOLE_BYTES == 32
#define WHOLE(NAME, A, B) (wu)_mm256_##NAME((__m256i)(A), (__m256i)(B))
#else
#define WHOLE(NAME, A, B) (wu)_mm_##NAME((__m128i)(A), (__m128i)(B))
#endif

/* Keep a vector in a register; GCC would load it again for each row. */
#if defined(KVQ_EMULATED) /* for tests: wider vectors than the processor has */
#define KEEP(VECTOR)
#elif defined(__AVX512F__)
#define KEEP(VECTOR) __asm__("" : "+v"(VECTOR))
#elif TOGETHER == 4
#define KEEP(VECTOR) __asm__ volatile("" : "+w"(VECTOR) : : "memory") /* or it would load all numbers first */
#else
#define KEEP(VECTOR) __asm__("" : "+x"(VECTOR))
#endif

/* A vector of sums; on ARM those of the higher bytes are apart. */
typedef struct {
  wu low;
#if TOGETHER == 4
  wu high;
#endif
} sums_t;

/* TOGETHER numbers of a row. */
#if TOGETHER == 4
typedef int8x8_t numbers_t;
#else
typedef wu numbers_t;
#endif

static inline __attribute__((always_inline)) numbers_t load_numbers(const int16_t *from) {
#if TOGETHER == 4
  return vld1_s8((const int8_t *)from);
#else
  return (wu){0} + *(const two_numbers *)from;
#endif
}

static inline __attribute__((always_inline)) void add_products(sums_t *sums, wu codes, numbers_t numbers) {
#if TOGETHER == 4
  sums->low = (wu)vdotq_lane_s32((int32x4_t)sums->low, (int8x16_t)codes, numbers, 0);
  sums->high = (wu)vdotq_lane_s32((int32x4_t)sums->high, (int8x16_t)codes, numbers, 1);
#elif WHOLE_BYTES == 64 && defined(__AVX512VNNI__)
  sums->low = (wu)_mm512_dpwssd_epi32((__m512i)sums->low, (__m512i)codes, (__m512i)numbers);
#elif WHOLE_BYTES == 32 && defined(__AVXVNNI__)
  sums->low = (wu)_mm256_dpwssd_avx_epi32((__m256i)sums->low, (__m256i)codes, (__m256i)numbers);
#else
  sums->low += WHOLE(madd_epi16, codes, numbers);
#endif
}

/* A chunk of a row; a run shorter than that is repeated until it fills one. */
static inline __attribute__((always_inline)) wu load_run(const uint8_t *from, const int64_t run) {
  uint32_t four;
  int64_t eight;
  memcpy(&four, from, 4);
  if (run == 4) return (wu){0} + four;
  memcpy(&eight, from, 8);
#if WHOLE_BYTES == 64
  if (run == 8) return (wu)_mm512_set1_epi64(eight);
  if (run == 16) return (wu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)from));
  if (run == 32) return (wu)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)from));
#elif WHOLE_BYTES == 32
  if (run == 8) return (wu)_mm256_set1_epi64x(eight);
  if (run == 16) return (wu)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
#elif TOGETHER == 4
  if (run == 8) return (wu)(two_words){eight, eight};
#else
  if (run == 8) return (wu)_mm_set1_epi64x(eight);
#endif
  return *(const wu_any *)from;
}

/* One plane of keys whose rows are shorter than a chunk, which is filled by the codes of one or several parts. */
static inline __attribute__((always_inline)) void unpack_short_rows(const int width, int shift, const int64_t run,
                                                                    int64_t rows, const uint8_t *from, uint8_t *to) {
  wu places, mask = (wu){0} + 0x01010101u * (uint32_t)((1 << width) - 1);
  for (int i = 0; i < LANES; i++) places[i] = (uint32_t)(i * 4 / run * width);
  for (int64_t row = 0; row < rows; row++, from += run) {
    wu packed = load_run(from, run);
    for (int part = 0; part < 8 / width; part += (int)(CHUNK / run), to += CHUNK) {
      wu codes = packed >> (places + (uint32_t)(part * width)) & mask;
      if (shift) codes = *(wu_any *)to | codes << shift;
      *(wu_any *)to = codes;
    }
  }
}

/* One plane of a block that is not multiplied as it is packed; the first one overwrites what stood there. */
static void unpack_bytes(const side_t *side, int is_key, int64_t width, int shift, const uint8_t *packed,
                         int8_t *codes) {
  int64_t L = side->block_length, D = side->head_dim, run = L * width / 8;
  uint8_t *to = (uint8_t *)codes;
  int is_short = is_key && WHOLE_BYTES > 16 && run < CHUNK && L % CHUNK == 0; /* 16: one shift for all lanes */
  if (is_short && width == 1 && run == 4) unpack_short_rows(1, shift, 4, D, packed, to);
  else if (is_short && width == 1 && run == 8) unpack_short_rows(1, shift, 8, D, packed, to);
  else if (is_short && width == 2 && run == 8) unpack_short_rows(2, shift, 8, D, packed, to);
  else if (is_short && width == 2 && run == 16) unpack_short_rows(2, shift, 16, D, packed, to);
  else if (is_short && width == 4 && run == 16) unpack_short_rows(4, shift, 16, D, packed, to);
  else unpack_plane(side, is_key, width, shift, 0, packed, codes);
}

/* Bytes have a sign on ARM, so codes of 8 bits lose their half there before they are multiplied. */
static inline int loses_half(const side_t *side) { return TOGETHER == 4 && side->bits == 8; }
static inline int64_t kept_half(const side_t *side) { return loses_half(side) ? 0 : 1 << (side->bits - 1); }

/* How the codes of a block lie when they are multiplied: as one plane is packed, or a byte each where there are several
 * planes, or rows that end in the middle of a vector. Keys have a row for each channel; values have one for each token
 * of a part. */
typedef struct {
  int is_direct;
  int64_t width, row_bytes, rows;
  int64_t passes; /* of a loop over the codes of a block */
  int64_t chunk_parts; /* of a row of keys that is shorter than a chunk, and repeated in it */
  uint32_t shifts[2][LANES]; /* where the parts stand, in the lower and the upper 8 of every 16 columns */
} layout_t;

static layout_t find_layout(const side_t *side, int is_key) {
  int64_t L = side->block_length, D = side->head_dim, width = side->widths[0], bytes = L * width / 8;
  int64_t group = side->per_channel || side->groups == 1 ? 0 : side->group_length;
  layout_t layout = {.width = 8, .row_bytes = is_key ? L : D, .rows = is_key ? D : L, .chunk_parts = 1};
  int fills_chunks = bytes % CHUNK == 0 || (bytes < CHUNK && (bytes == 8 || bytes == 16 || bytes == 32));
  int is_one = side->plane_count == 1 && !side->levels;
  if (is_one && (is_key ? fills_chunks && D % TOGETHER == 0 && group % TOGETHER == 0
                        : bytes % TOGETHER == 0 && L <= MAX_SUMMED && D % CHUNK == 0 && group % CHUNK == 0)) {
    layout.is_direct = 1, layout.width = width;
    if (is_key) layout.row_bytes = bytes;
    else layout.rows = bytes;
    if (is_key && bytes < CHUNK) layout.chunk_parts = CHUNK / bytes;
  }
  layout.passes = side->levels ? layout.rows : divide_up(layout.rows, TOGETHER) * (VECTORS / SUMMED_VECTORS);
  layout.passes *= count_chunks(side, is_key);
  for (int i = 0; i < LANES && layout.chunk_parts > 1; i++) {
    layout.shifts[0][i] = (uint32_t)(i / 4 * 16 / bytes * width);
    layout.shifts[1][i] = (uint32_t)((i / 4 * 16 + 8) / bytes * width);
  }
  return layout;
}

/* Multiply N vectors of codes by the numbers of each of R rows that meet them. */
static inline __attribute__((always_inline)) void add_rows(const int R, const int N, sums_t total[MAX_ROWS][VECTORS],
                                                           const wu *codes, const int16_t *numbers, int64_t stride) {
  UNROLLED for (int r = 0; r < R; r++) {
    numbers_t row = load_numbers(numbers + r * stride);
    UNROLLED for (int n = 0; n < N; n++) {
      add_products(&total[r][n], codes[n], row);
      KEEP(total[r][n].low);
    }
  }
}

static inline __attribute__((always_inline)) void start_rows(const int R, const int N,
                                                             sums_t total[MAX_ROWS][VECTORS], const uint32_t *start) {
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int n = 0; n < N; n++) total[r][n] = (sums_t){.low = (wu){0} + start[r]};
}

static inline __attribute__((always_inline)) void store_rows(const int R, const int N,
                                                             sums_t total[MAX_ROWS][VECTORS], uint32_t *sums) {
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int n = 0; n < N; n++) {
#if TOGETHER == 4
      total[r][n].low += total[r][n].high << 8;
#endif
      ((wu *)sums)[r * VECTORS + n] = total[r][n].low;
    }
}

/* Bytes of TOGETHER rows in turn, of the lower or the upper 8 of every 16 columns. */
typedef struct {
  wu part[TOGETHER / 2];
} words_t;

static inline __attribute__((always_inline)) words_t interleave(const wu *rows, int is_upper) {
#if TOGETHER == 4
  uint8x16_t a = (uint8x16_t)rows[0], b = (uint8x16_t)rows[1], c = (uint8x16_t)rows[2], d = (uint8x16_t)rows[3];
  uint16x8_t ab = (uint16x8_t)(is_upper ? vzip2q_u8(a, b) : vzip1q_u8(a, b));
  uint16x8_t cd = (uint16x8_t)(is_upper ? vzip2q_u8(c, d) : vzip1q_u8(c, d));
  return (words_t){{(wu)vzip1q_u16(ab, cd), (wu)vzip2q_u16(ab, cd)}};
#else
  return (words_t){{is_upper ? WHOLE(unpackhi_epi16, rows[0], rows[1]) : WHOLE(unpacklo_epi16, rows[0], rows[1])}};
#endif
}

/* What is left of words when they are shifted so that a code stands lowest. */
static inline __attribute__((always_inline)) wu mask_codes(int width) {
  return (wu){0} + (TOGETHER == 4 ? 0x01010101u : 0x00010001u) * (uint32_t)((1 << width) - 1);
}

/* Two vectors of codes; `half` is taken off by turning the highest bit over. */
static inline __attribute__((always_inline)) void split_words(wu *codes, words_t words, wu mask, wu half) {
#if TOGETHER == 4
  for (int i = 0; i < 2; i++) codes[i] = (words.part[i] & mask) ^ half;
#else
  (void)half;
  codes[0] = words.part[0] & mask, codes[1] = words.part[0] >> 8 & mask;
#endif
  KEEP(codes[0]);
  KEEP(codes[1]);
}

/* What a loop over the codes of a chunk takes. */
typedef struct {
  const int16_t *numbers; /* of R rows, `stride` apart */
  int64_t stride;
  const uint32_t *start; /* [R] */
  const uint8_t *codes;
  int64_t row_bytes, passes;
  int width, place; /* of a code in a byte */
  uint32_t half; /* that codes lose in a vector, see `split_words` */
  const uint32_t (*shifts)[LANES]; /* to be added to the place */
  uint32_t *sums; /* [R][CHUNK] */
  const uint8_t *ahead;
  int64_t pace;
} loop_t;

/* A pass of a loop over the codes takes TOGETHER vectors of bytes, at most two lines of memory. */
static inline void fetch_pace(const uint8_t *ahead, int64_t pace) {
  __builtin_prefetch(ahead);
  if (WHOLE_BYTES == LINE_BYTES && pace > LINE_BYTES) __builtin_prefetch(ahead + LINE_BYTES);
}

/* Keys: sums of R rows and of the vectors of a chunk from `first` on. A row of fewer bytes than a chunk has `run` of
 * them, or else 0 is said. */
static inline __attribute__((always_inline)) void sum_keys(const int R, const int first, const int64_t run,
                                                           const int is_shifted, const loop_t *loop) {
  enum { N = SUMMED_VECTORS };
  sums_t total[MAX_ROWS][VECTORS];
  wu codes[VECTORS], mask = mask_codes(loop->width), half = (wu){0} + (is_shifted && !run ? 0 : loop->half);
  const int16_t *numbers = loop->numbers;
  const uint8_t *from = loop->codes, *ahead = loop->ahead;
  int64_t stride = loop->stride, row_bytes = run ? run : loop->row_bytes, pace = loop->pace;
#if WHOLE_BYTES == 16 /* one shift does for all lanes */
  int shifts[2] = {loop->place + (int)loop->shifts[0][0], loop->place + (int)loop->shifts[1][0]};
#else
  wu shifts[2];
  for (int i = 0; i < 2; i++) shifts[i] = *(const wu_any *)loop->shifts[i] + (uint32_t)loop->place;
#endif
  start_rows(R, N, total, loop->start);
  for (const int16_t *end = numbers + loop->passes * TOGETHER; numbers < end; numbers += TOGETHER) {
    wu rows[TOGETHER];
    UNROLLED for (int i = 0; i < TOGETHER; i++) rows[i] = load_run(from + i * row_bytes, run ? run : CHUNK);
    from += TOGETHER * row_bytes;
    fetch_pace(ahead, pace);
    ahead += pace;
    UNROLLED for (int n = 0; n < N; n += 2) {
      words_t words = interleave(rows, (first + n) / 2);
      UNROLLED for (int i = 0; i < TOGETHER / 2 && is_shifted; i++) words.part[i] >>= shifts[(first + n) / 2];
      split_words(codes + n, words, mask, half);
    }
    add_rows(R, N, total, codes, numbers, stride);
  }
  store_rows(R, N, total, loop->sums + first * LANES);
}

/* Values: the same; every part of a row has numbers of its own. */
static inline __attribute__((always_inline)) void sum_values(const int R, const int first, const int width,
                                                             const loop_t *loop) {
  enum { N = SUMMED_VECTORS };
  sums_t total[MAX_ROWS][VECTORS];
  wu codes[VECTORS], mask = mask_codes(width), half = (wu){0} + (width < 8 ? 0 : loop->half);
  const int16_t *numbers = loop->numbers;
  const uint8_t *from = loop->codes, *ahead = loop->ahead;
  int64_t stride = loop->stride, row_bytes = loop->row_bytes, part_rows = loop->passes * TOGETHER, pace = loop->pace;
  start_rows(R, N, total, loop->start);
  for (const int16_t *end = numbers + part_rows; numbers < end; numbers += TOGETHER) {
    wu rows[TOGETHER];
    words_t words[VECTORS / 2];
    UNROLLED for (int i = 0; i < TOGETHER; i++) rows[i] = *(const wu_any *)(from + i * row_bytes);
    from += TOGETHER * row_bytes;
    fetch_pace(ahead, pace);
    ahead += pace;
    UNROLLED for (int n = 0; n < N; n += 2) words[n / 2] = interleave(rows, (first + n) / 2);
    UNROLLED for (int part = 0; part < 8 / width; part++) {
      UNROLLED for (int n = 0; n < N; n += 2) {
        split_words(codes + n, words[n / 2], mask, half);
        UNROLLED for (int i = 0; i < TOGETHER / 2; i++) words[n / 2].part[i] >>= width;
      }
      add_rows(R, N, total, codes, numbers + part * part_rows, stride);
    }
  }
  store_rows(R, N, total, loop->sums + first * LANES);
}

#define DEFINE_SUMS(R)                                                                                               \
  static void sum_keys_##R(loop_t *loop, int64_t run, int is_shifted) {                                              \
    UNROLLED for (int first = 0; first < VECTORS; first += SUMMED_VECTORS) {                                         \
      if (run == 8) sum_keys(R, first, 8, 1, loop);                                                                  \
      else if (run == 16 && CHUNK > 16) sum_keys(R, first, 16, 1, loop);                                             \
      else if (run == 32 && CHUNK > 32) sum_keys(R, first, 32, 1, loop);                                             \
      else if (is_shifted) sum_keys(R, first, 0, 1, loop);                                                           \
      else sum_keys(R, first, 0, 0, loop);                                                                           \
      loop->ahead += loop->passes * loop->pace;                                                                      \
    }                                                                                                                \
  }                                                                                                                  \
  static void sum_values_##R(loop_t *loop) {                                                                         \
    UNROLLED for (int first = 0; first < VECTORS; first += SUMMED_VECTORS) {                                         \
      if (loop->width == 8) sum_values(R, first, 8, loop);                                                           \
      else if (loop->width == 4) sum_values(R, first, 4, loop);                                                      \
      else if (loop->width == 2) sum_values(R, first, 2, loop);                                                      \
      else sum_values(R, first, 1, loop);                                                                            \
      loop->ahead += loop->passes * loop->pace;                                                                      \
    }                                                                                                                \
  }
DEFINE_SUMS(1)
DEFINE_SUMS(2)
DEFINE_SUMS(3)
DEFINE_SUMS(4)

/* Bring the sums of a chunk into the order of its columns; on ARM they are in it. */
static inline __attribute__((always_inline)) void order_sums(float *to, const uint32_t *sums) {
#if WHOLE_BYTES == 64
  __m512 fours[VECTORS]; /* columns 0 to 3 of every 16, then 4 to 7, and so on */
  for (int half = 0; half < 2; half++) {
    __m512 even = _mm512_cvtepi32_ps(((const __m512i *)sums)[2 * half]);
    __m512 odd = _mm512_cvtepi32_ps(((const __m512i *)sums)[2 * half + 1]);
    fours[2 * half] = _mm512_unpacklo_ps(even, odd);
    fours[2 * half + 1] = _mm512_unpackhi_ps(even, odd);
  }
  /* The first two groups of 16 columns of each four, then the other two, and each group by itself. */
  __m512 low[2] = {_mm512_shuffle_f32x4(fours[0], fours[1], 0x44), _mm512_shuffle_f32x4(fours[0], fours[1], 0xee)};
  __m512 high[2] = {_mm512_shuffle_f32x4(fours[2], fours[3], 0x44), _mm512_shuffle_f32x4(fours[2], fours[3], 0xee)};
  for (int half = 0; half < 2; half++) {
    store(to + 32 * half, (vf)_mm512_shuffle_f32x4(low[half], high[half], 0x88));
    store(to + 32 * half + 16, (vf)_mm512_shuffle_f32x4(low[half], high[half], 0xdd));
  }
#elif WHOLE_BYTES == 32 && VL == 8
  __m256 numbers[VECTORS];
  for (int i = 0; i < VECTORS; i++) numbers[i] = _mm256_cvtepi32_ps(((const __m256i *)sums)[i]);
  for (int half = 0; half < 2; half++) {
    __m256 low = _mm256_unpacklo_ps(numbers[2 * half], numbers[2 * half + 1]);
    __m256 high = _mm256_unpackhi_ps(numbers[2 * half], numbers[2 * half + 1]);
    store(to + 8 * half, (vf)_mm256_permute2f128_ps(low, high, 0x20));
    store(to + 8 * half + 16, (vf)_mm256_permute2f128_ps(low, high, 0x31));
  }
#elif TOGETHER == 4
  for (int i = 0; i < VECTORS; i++) store(to + VL * i, __builtin_convertvector(((const vi *)sums)[i], vf));
#else
  for (int i = 0; i < LANES; i += 4, to += 16)
    for (int half = 0; half < 2; half++) {
      __m128 even = _mm_cvtepi32_ps(_mm_load_si128((const __m128i *)(sums + 2 * half * LANES + i)));
      __m128 odd = _mm_cvtepi32_ps(_mm_load_si128((const __m128i *)(sums + (2 * half + 1) * LANES + i)));
      _mm_storeu_ps(to + 8 * half, _mm_unpacklo_ps(even, odd));
      _mm_storeu_ps(to + 8 * half + 4, _mm_unpackhi_ps(even, odd));
    }
#endif
}

/* Numbers of up to MAX_ROWS rows in whole steps. */
typedef struct {
  int16_t *numbers; /* [LAYERS][MAX_ROWS][stride] */
  int64_t stride;
  float inverse[MAX_ROWS], step[LAYERS][MAX_ROWS];
  float rest[MAX_ROWS]; /* what the remainders come to with an average code */
  uint32_t start[LAYERS][MAX_ROWS]; /* less the half of the codes, for all numbers of a row */
  float error[MAX_ROWS]; /* standard deviation of the error of a score */
  int coarse_rows, coarse[MAX_ROWS]; /* those with a second layer, which holds them alone */
} rounded_t;

static inline vi to_whole(vf x) {
#if VL == 16
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif VL == 8
  return (vi)_mm256_cvtps_epi32((__m256)x);
#elif TOGETHER == 4
  return (vi)vcvtnq_s32_f32((float32x4_t)x);
#else
  return (vi)_mm_cvtps_epi32((__m128)x);
#endif
}

/* Store whole numbers as `add_products` takes them. */
static inline void store_whole(int16_t *to, vi x) {
#if TOGETHER == 4
  vi high = (x + 128) >> 8; /* rounded, so the lower byte lies within -128 and 127 */
  *(vb_any *)to = __builtin_convertvector(x - (high << 8), vb);
  *(vb_any *)(to + 2) = __builtin_convertvector(high, vb);
#elif VL == 16
  *(vs_any *)to = (vs)_mm512_cvtepi32_epi16((__m512i)x);
#elif VL == 8 && defined(__AVX2__)
  *(vs_any *)to = (vs)_mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  *(vs_any *)to = __builtin_convertvector(x, vs);
#endif
}

/* The step by which a row becomes whole, from the bits of its largest sizes. One that is not finite makes it NaN, and
 * so all sums. */
static inline void set_step(rounded_t *rounded, int r, vi sizes) {
  int is_finite = sum_fast((vf)sizes * 0.0f) == 0;
  float largest = largest_lane((vf)sizes);
  rounded->inverse[r] = largest < 1e-33f ? 0.0f : LARGEST / largest;
  rounded->step[0][r] = is_finite ? largest * (1 / LARGEST) : NAN;
  rounded->step[1][r] = rounded->step[0][r] / REMAINDER_STEPS;
}

/* The first `count` numbers of a vector; 0 for the others, which belong to the next group. */
static inline vf first_numbers(vf x, int64_t count) {
  vi place;
  for (int i = 0; i < VL; i++) place[i] = i;
  return choose(place < (int32_t)count, x, (vf){0});
}

/* Round a layer of one row of `count` numbers to its place there, and fill the last vector up with 0; return the sum of
 * squares of the whole numbers of the first where it is wanted. */
static inline __attribute__((always_inline)) float round_row(rounded_t *rounded, const int layer,
                                                             const int wants_squares, int place, int r,
                                                             const float *from, int64_t count, int64_t half) {
  int16_t *to = rounded->numbers + (layer * MAX_ROWS + place) * rounded->stride;
  vf squares = {0}, exact = {0}, inverse = splat(rounded->inverse[r]);
  vi sum = {0};
  for (int64_t i = 0; i < count; i += VL) {
    vf scaled = load(from + i) * inverse;
    if (i + VL > count) scaled = first_numbers(scaled, count - i);
    vi whole = to_whole(scaled);
    if (layer) whole = to_whole((scaled - __builtin_convertvector(whole, vf)) * REMAINDER_STEPS);
    else exact += scaled;
    if (wants_squares) squares += scaled * scaled;
    store_whole(to + i, whole);
    sum += whole;
  }
  rounded->start[layer][place] = -(uint32_t)sum_whole(sum) * (uint32_t)half;
  /* Lane by lane, so that what is left of large sums is exact enough. */
  vf remainders = exact - __builtin_convertvector(sum, vf);
  rounded->rest[r] = layer ? 0.0f : -0.5f * rounded->step[0][r] * sum_fast(remainders);
  return wants_squares ? sum_fast(squares) : 0.0f;
}
#else
#define MAX_SUMMED INT32_MAX

typedef struct {
  int64_t passes;
} layout_t;

static layout_t find_layout(const side_t *side, int is_key) {
  return (layout_t){(is_key ? side->head_dim : side->block_length) * count_chunks(side, is_key)};
}
#endif

/* Widen scales or mids, which may be bytes, and multiply them. */
static void widen_numbers(float *to, const uint8_t *from, int64_t type, int64_t count, const side_t *side,
                          float factor) {
  const int8_t *mids = (const int8_t *)from;
  int64_t i = 0;
  if (type == U8)
    for (; i < count; i++) to[i] = from[i] == ZERO_SCALE ? 0.0f : side->factors[from[i]] * factor;
  else if (type == I8)
    for (; i < count; i++) to[i] = mids[i] == LOST_MID ? NAN : (float)mids[i] * factor;
  else if (type == F16) {
    for (; i + VL <= count; i += VL) store(to + i, load_half((const uint16_t *)from + i) * factor);
    for (; i < count; i++) to[i] = half_to_float(((const uint16_t *)from)[i]) * factor;
  } else
    for (; i < count; i++) to[i] = ((const float *)from)[i] * factor;
}

static void read_numbers(float *to, const uint8_t *from, int64_t type, const side_t *side, float factor) {
  int64_t L = side->block_length, groups = side->groups;
  if (side->per_channel || groups == 1) {
    widen_numbers(to, from, type, side->per_channel ? side->head_dim : L, side, factor);
    return;
  }
  float *wide = to + L * groups + VL;
  widen_numbers(wide, from, type, L * groups, side, factor);
  if (groups == 2) {
    for (int64_t t = 0; t < L; t++) {
      to[t] = wide[2 * t];
      to[L + t] = wide[2 * t + 1];
    }
    return;
  }
  for (int64_t g = 0; g < groups; g++)
    for (int64_t t = 0; t < L; t++) to[g * L + t] = wide[t * groups + g];
}

static void read_factors(float *to, const uint8_t *codes, int64_t count, const float *factors) {
  for (int64_t i = 0; i < count; i += 8) /* blocks have a multiple of 8 tokens */
    for (int64_t j = i; j < i + 8; j++) to[j] = factors[codes[j]];
}

/* Look up to CHUNK codes up in a codebook, of at least 16 numbers; up to 4 bits find them in registers. */
static inline void look_up(float *to, const uint8_t *codes, int64_t count, const float *levels, int64_t bits) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; bits <= 4 && i + VL <= count; i += VL) {
    __m512i place = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
    store(to + i, (vf)_mm512_permutexvar_ps(place, (__m512)load(levels)));
  }
#elif defined(__AVX2__)
  for (; bits <= 4 && i + VL <= count; i += VL) {
    __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
    __m256 low = _mm256_permutevar8x32_ps((__m256)load(levels), place);
    __m256 high = _mm256_permutevar8x32_ps((__m256)load(levels + 8), place);
    __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(place, 28)); /* its sign */
    store(to + i, (vf)_mm256_blendv_ps(low, high, is_high));
  }
#endif
  (void)bits;
  /* A loop of few instructions takes half as long again where it happens to straddle two lines of code. */
  _Pragma("GCC unroll 4") for (; i < count; i++) to[i] = levels[codes[i]];
}

/* Look the codes of a block up, chunk by chunk, as they are multiplied. */
static void look_up_block(const side_t *side, int is_key, block_t *block) {
  int64_t L = side->block_length, D = side->head_dim, outer = is_key ? D : L, inner = is_key ? L : D;
  int64_t columns = count_columns(side, is_key);
  float few[16] = {0}, *to = block->levels;
  const float *levels = side->bits < 4 ? few : side->levels;
  if (side->bits < 4) memcpy(few, side->levels, (size_t)4 << side->bits);
  for (int64_t group = 0; group < inner; group += columns)
    for (int64_t end = least(inner, group + columns), c = group; c < end; c += CHUNK)
      for (int64_t row = 0; row < outer; row++, to += CHUNK)
        look_up(to, (const uint8_t *)block->codes + row * inner + c, least(CHUNK, end - c), levels, side->bits);
}

/* Ask for some bytes of memory at once. */
static inline void fetch(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE_BYTES) __builtin_prefetch(from + i);
  __builtin_prefetch(from + bytes - 1);
}

/* Read the block under the cursor, for a row of the batch and a head, and move on. Scales, mids, factors and all planes
 * but the widest of the next one are asked for here. */
static void read_block(const side_t *side, int is_key, cursor_t *cursor, int64_t row, int64_t head, int64_t heads,
                       const layout_t *layout, block_t *block) {
  const segment_t *segment = side->segments + cursor->segment;
  int64_t from = segment->rows ? segment->rows[row] : row;
  int64_t place = (from * heads + head) * segment->capacity + cursor->block;
  int64_t L = side->block_length, D = side->head_dim, numbers = side->per_channel ? D : L * side->groups;
  int shift = 0;
  for (int64_t p = 0; p < side->plane_count; p++) {
    int64_t width = side->widths[p];
    int64_t bytes = L * width / 8 * D;
    const uint8_t *packed = segment->planes[p] + place * bytes;
    if (p == 0) block->ahead = packed + bytes, block->pace = bytes / layout->passes;
    else fetch(packed + bytes, bytes);
#if defined(WHOLE_BYTES)
    block->rows = layout->is_direct ? packed : (const uint8_t *)block->codes;
    if (!layout->is_direct) unpack_bytes(side, is_key, width, shift, packed, block->codes);
#else
    int is_last = p + 1 == side->plane_count;
    uint8_t half = is_last && !side->levels ? (uint8_t)(1 << (side->bits - 1)) : 0;
    unpack_plane(side, is_key, width, shift, half, packed, block->codes);
#endif
    shift += (int)width;
  }
  if (side->levels) look_up_block(side, is_key, block);
  int64_t scale_bytes = numbers * size_of(side->scale_type), mid_bytes = numbers * size_of(side->mid_type);
  const uint8_t *scale = segment->scale + place * scale_bytes;
  const uint8_t *mid = segment->mid ? segment->mid + place * mid_bytes : NULL;
  const uint8_t *factor = segment->factor ? segment->factor + place * L : NULL;
  fetch(scale + scale_bytes, scale_bytes);
  if (mid) fetch(mid + mid_bytes, mid_bytes);
  if (factor) fetch(factor + L, L);
  block->has_factor = factor != NULL;
  if (factor) read_factors(block->factor, factor, L, side->factors);
  float scale_unit = segment->exponent ? ldexpf(1.0f, segment->exponent[place]) : 1.0f;
  float mid_unit = side->shifts_mid ? scale_unit : 1.0f;
  if (segment->units) scale_unit = segment->units[2 * place], mid_unit = segment->units[2 * place + 1];
  read_numbers(block->scale, scale, side->scale_type, side, scale_unit);
  if (mid) read_numbers(block->mid, mid, side->mid_type, side, mid_unit);
  else memset(block->mid, 0, 4 * numbers);
  if (++cursor->block == segment->used) cursor->segment++, cursor->block = 0;
}

/* ---- One key-value head of one row of the batch */

/* The squares of the weights of a row so far, and what coarse scores may have cost, squared too: in a random sum,
 * squares add up. */
typedef struct {
  float sum, cost;
} squares_t;

typedef struct {
  const request_t *q;
  int64_t row, head, rows; /* rows: R */
  int64_t score_stride;
  float *query, *rotated, *query_sums; /* [R][D], [R][D], [R][groups] */
  float *folded;                       /* [MAX_ROWS][fold_stride]; rows end with zeros */
  int64_t fold_stride;                 /* max(D, D_v, L) in whole vectors */
  float *sums;                         /* [MAX_ROWS][max(CHUNK, MAX_VECTORS * VL)] */
  float *scores;                       /* [R][score_stride] */
  float *stored_sum, *exact_sum;       /* [R][D_v] */
  float *largest, *total;              /* [R] */
  squares_t *weights;                  /* [R], of stored tokens, relative to the weight of `highest` */
  float *highest;                      /* [R] */
  float *states;                       /* [EXACT_TILE][D_v] */
  int can_wait; /* scores are refined once it is known where that matters */
  layout_t layouts[2]; /* of values, of keys */
  block_t block;
#if defined(WHOLE_BYTES)
  rounded_t rounded;
  uint32_t *totals; /* [MAX_ROWS][CHUNK] */
#endif
} work_t;

/* The error of a score, or of a weight as a share of all, beyond which numbers are rounded in two layers. It is far
 * below what the output is rounded by, and in fp32 below what a kernel is held to. */
static inline float accepted_error(const request_t *q) {
  return q->query_type == F32 ? 6e-5f : q->query_type == F16 ? 1e-4f : 3e-4f;
}

/* Copy R rows of `count` numbers, each times a factor where there are any, and end them with zeros. Put into `constant`
 * the sum of the numbers, each times a mid where there are any, or else its factor. */
static inline __attribute__((always_inline)) void fold_rows(work_t *w, const int R, const float *from, int64_t stride,
                                                            const float *factors, const float *mids, int64_t count,
                                                            float *constant) {
  vf total[MAX_ROWS];
  vi sizes[MAX_ROWS]; /* as the bits of floats, which are in the same order */
  int64_t whole = count - count % VL, fold_stride = w->fold_stride;
  float *products = w->folded;
  UNROLLED for (int r = 0; r < R; r++) total[r] = (vf){0}, sizes[r] = (vi){0};
  for (int64_t i = 0; i < whole; i += VL) {
    vf factor = factors ? load(factors + i) : splat(1.0f), mid = mids ? load(mids + i) : splat(1.0f);
    UNROLLED for (int r = 0; r < R; r++) {
      vf one = load(from + r * stride + i), product = factors ? one * factor : one;
      store(products + r * fold_stride + i, product);
      total[r] += mids ? one * mid : product;
      sizes[r] = larger((vi)product & 0x7fffffff, sizes[r]);
    }
  }
  for (int r = 0; r < R; r++) {
    const float *row = from + r * stride;
    float *folded = products + r * fold_stride;
    constant[r] = sum_fast(total[r]);
    if (whole < count) {
      int64_t i = whole;
      for (; i < count; i++) {
        folded[i] = factors ? row[i] * factors[i] : row[i];
        constant[r] += mids ? row[i] * mids[i] : folded[i];
      }
      for (; i % VL; i++) folded[i] = 0;
      sizes[r] = larger((vi)load(folded + whole) & 0x7fffffff, sizes[r]);
    }
#if defined(WHOLE_BYTES)
    set_step(&w->rounded, r, sizes[r]);
#endif
  }
}

#define DEFINE_FOLD(R)                                                                                               \
  static void fold_##R(work_t *w, const float *from, int64_t stride, const float *factors, const float *mids,        \
                       int64_t count, float *constant) {                                                             \
    if (factors && mids) fold_rows(w, R, from, stride, factors, mids, count, constant);                              \
    else if (factors) fold_rows(w, R, from, stride, factors, NULL, count, constant);                                 \
    else fold_rows(w, R, from, stride, NULL, NULL, count, constant);                                                 \
  }
DEFINE_FOLD(1)
DEFINE_FOLD(2)
DEFINE_FOLD(3)
DEFINE_FOLD(4)

static void fold(work_t *w, int rows, const float *from, int64_t stride, const float *factors, const float *mids,
                 int64_t count, float *constant) {
  if (rows == 1) fold_1(w, from, stride, factors, mids, count, constant);
  else if (rows == 2) fold_2(w, from, stride, factors, mids, count, constant);
  else if (rows == 3) fold_3(w, from, stride, factors, mids, count, constant);
  else fold_4(w, from, stride, factors, mids, count, constant);
}

#if defined(WHOLE_BYTES)
/* Round the row `r` in a second layer too. */
static void refine(work_t *w, const side_t *side, int r, int64_t start, int64_t count) {
  rounded_t *rounded = &w->rounded;
  int place = rounded->coarse_rows++;
  rounded->coarse[place] = r;
  round_row(rounded, 1, 0, place, r, w->folded + start + r * w->fold_stride, count, kept_half(side));
}
#endif

/* Prepare the folded numbers from `start` on for `multiply`. `unit`: what a step of a code comes to in a score; 0 for
 * weights, whose error is measured against all of the block. `can_wait`: scores are refined later, where it matters. */
static void round_rows(work_t *w, const side_t *side, int rows, int64_t start, int64_t count, float unit,
                       int can_wait) {
#if defined(WHOLE_BYTES)
  if (side->levels) return;
  rounded_t *rounded = &w->rounded;
  int64_t half = 1 << (side->bits - 1), taken = kept_half(side);
  float accepted = accepted_error(w->q);
  /* Remainders are even within a step, so their deviation is 0.29; that of codes is about 0.58 halves. A score has the
   * errors of all groups, so all channels count. */
  float error = unit != 0 ? 0.167f * sqrtf((float)side->head_dim) * (float)half * unit : 0.084f * (float)count;
  const float *from = w->folded + start;
  rounded->coarse_rows = 0;
  for (int r = 0; r < rows; r++) {
    const float *row = from + r * w->fold_stride;
    float squares = unit != 0 ? round_row(rounded, 0, 0, r, r, row, count, taken)
                              : round_row(rounded, 0, 1, r, r, row, count, taken);
    float step = rounded->step[0][r];
    int is_coarse;
    rounded->error[r] = error * step;
    if (unit != 0) is_coarse = !can_wait && rounded->error[r] > accepted;
    else is_coarse = error > squares * (accepted * accepted);
    if (is_coarse && step > 0) refine(w, side, r, start, count);
  }
#else
  (void)w, (void)side, (void)rows, (void)start, (void)count, (void)unit, (void)can_wait;
#endif
}

/* Where the sums of a chunk go: `to += (sum + base) * scale + mid * share`, or `=` where nothing is there yet. */
typedef struct {
  float *to;                          /* rows are `stride` apart */
  int64_t stride;
  const float *base, *share;          /* [rows] */
  const float *scale, *mid;           /* [columns]; NULL: 1, 0 */
  int adds;
} target_t;

static inline __attribute__((always_inline)) void join(float *to, const float *sums, int64_t columns, float step,
                                                       float base, const float *scale, const float *mid, float share,
                                                       const int adds) {
  int64_t i = 0;
  for (; i + VL <= columns; i += VL) {
    vf number = load(sums + i) * step + base;
    if (scale) number *= load(scale + i);
    if (mid) number += load(mid + i) * share;
    if (adds) number += load(to + i);
    store(to + i, number);
  }
  for (; i < columns; i++) {
    float number = (sums[i] * step + base) * (scale ? scale[i] : 1.0f) + (mid ? mid[i] * share : 0.0f);
    to[i] = adds ? to[i] + number : number;
  }
}

/* The sums of one row, in steps; a second layer adds to what the first one left. */
static inline __attribute__((always_inline)) void join_row(const target_t *target, int r, const float *sums,
                                                           int64_t columns, float step, float rest, int layer) {
  float *to = target->to + r * target->stride, base = rest + target->base[r];
  const float *scale = target->scale;
  int adds = target->adds || layer;
  if (target->mid && !layer) join(to, sums, columns, step, base, scale, target->mid, target->share[r], 1);
  else if (scale && adds) join(to, sums, columns, step, base, scale, NULL, 0, 1);
  else if (scale) join(to, sums, columns, step, base, scale, NULL, 0, 0);
  else if (adds) join(to, sums, columns, step, base, NULL, NULL, 0, 1);
  else join(to, sums, columns, step, base, NULL, NULL, 0, 0);
}

/* The highest number, at least `highest`, without those that are NaN. */
static inline float highest_of(const float *x, int64_t count, float highest) {
  vf numbers = splat(highest);
  int64_t i = 0;
  for (; i + VL <= count; i += VL) numbers = larger_float(numbers, load(x + i));
  highest = largest_lane(numbers);
  for (; i < count; i++) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

static const float NOTHING[MAX_ROWS];

/* As `multiply`, with numbers of a codebook, in fp32. */
static void multiply_levels(work_t *w, int is_key, int rows, int64_t start, int64_t count, int64_t column,
                            int64_t columns, const target_t *target, const uint8_t **ahead) {
  const side_t *side = is_key ? &w->q->key : &w->q->value;
  int64_t outer = is_key ? side->head_dim : side->block_length, together = count_columns(side, is_key);
  int64_t chunk = column / together * divide_up(together, CHUNK) + column % together / CHUNK, pace = w->block.pace;
  const float *levels = w->block.levels + (chunk * outer + start) * CHUNK;
  for (int64_t c = 0; c < columns; c += MAX_VECTORS * VL, pace = 0)
    multiply_states(rows, (int)divide_up(least(MAX_VECTORS * VL, columns - c), VL), w->folded + start, w->fold_stride,
                    count, levels + c, CHUNK, w->sums + c, CHUNK, *ahead, pace);
  for (int r = 0; r < rows; r++) join_row(target, r, w->sums + r * CHUNK, columns, 1.0f, 0.0f, 0);
  *ahead += count * w->block.pace;
}

#if defined(WHOLE_BYTES)
static void sum_chunk(loop_t *loop, int is_key, int rows, int64_t run, int is_shifted) {
  if (is_key && rows == 1) sum_keys_1(loop, run, is_shifted);
  else if (is_key && rows == 2) sum_keys_2(loop, run, is_shifted);
  else if (is_key && rows == 3) sum_keys_3(loop, run, is_shifted);
  else if (is_key) sum_keys_4(loop, run, is_shifted);
  else if (rows == 1) sum_values_1(loop);
  else if (rows == 2) sum_values_2(loop);
  else if (rows == 3) sum_values_3(loop);
  else sum_values_4(loop);
}

/* As `multiply`, a layer of the rounded rows. */
static void multiply_layer(work_t *w, int is_key, int layer, int rows, int64_t start, int64_t count, int64_t column,
                           int64_t columns, const target_t *target, const uint8_t **ahead) {
  const side_t *side = is_key ? &w->q->key : &w->q->value;
  rounded_t *rounded = &w->rounded;
  const layout_t *layout = &w->layouts[is_key];
  int is_repeated = layout->chunk_parts > 1;
  int64_t part = !is_key ? 0 : is_repeated ? column / CHUNK * layout->chunk_parts : column / layout->row_bytes;
  loop_t loop;
  loop.stride = rounded->stride, loop.row_bytes = layout->row_bytes, loop.shifts = layout->shifts;
  loop.width = (int)layout->width, loop.place = (int)(part * layout->width);
  loop.half = loses_half(side) ? 0x80808080u : 0, loop.sums = w->totals;
  loop.codes = w->block.rows + start * layout->row_bytes + (is_repeated ? 0 : column - part * layout->row_bytes);
  loop.passes = divide_up(is_key ? count : least(count, layout->rows), TOGETHER);
  loop.numbers = rounded->numbers + layer * MAX_ROWS * rounded->stride;
  loop.start = rounded->start[layer], loop.ahead = *ahead, loop.pace = layer ? 0 : w->block.pace;
  sum_chunk(&loop, is_key, rows, is_repeated ? layout->row_bytes : 0, loop.place || is_repeated);
  for (int i = 0; i < rows; i++) {
    int r = layer ? rounded->coarse[i] : i;
    float sums[CHUNK], step = rounded->step[layer][r];
    order_sums(sums, w->totals + i * CHUNK);
    if (columns == CHUNK) join_row(target, r, sums, CHUNK, step, rounded->rest[r], layer);
    else join_row(target, r, sums, columns, step, rounded->rest[r], layer);
  }
  *ahead = loop.ahead;
}

/* Multiply the rounded rows by a chunk of columns of the `count` rows of codes from `start` on. `ahead` moves on. */
static void multiply(work_t *w, int is_key, int rows, int64_t start, int64_t count, int64_t column, int64_t columns,
                     const target_t *target, const uint8_t **ahead) {
  if ((is_key ? &w->q->key : &w->q->value)->levels) {
    multiply_levels(w, is_key, rows, start, count, column, columns, target, ahead);
    return;
  }
  multiply_layer(w, is_key, 0, rows, start, count, column, columns, target, ahead);
  int coarse_rows = w->rounded.coarse_rows;
  target_t rest = *target;
  rest.base = NOTHING;
  if (coarse_rows) multiply_layer(w, is_key, 1, coarse_rows, start, count, column, columns, &rest, ahead);
}

/* The sum of squared weights of scores, relative to the weight of a higher one. */
static float sum_squares(const float *scores, int64_t count, float highest) {
  vf total = {0};
  int64_t i = 0;
  for (; i + VL <= count; i += VL) {
    vf weight = exponential(load(scores + i) - highest);
    total += weight * weight;
  }
  float sum = sum_fast(total);
  for (; i < count; i++) sum += expf(2 * (scores[i] - highest));
  return sum;
}

/* Refine the scores of a block where its tokens may weigh enough for their errors to show beside those before. Half of
 * the error's square is for that, the rest for other roundings. */
static void refine_scores(work_t *w, int64_t first, int rows, float *scores) {
  const side_t *side = &w->q->key;
  int64_t L = side->block_length, D = side->head_dim;
  float accepted = accepted_error(w->q), taken_back[MAX_ROWS];
  const uint8_t *ahead = w->block.ahead;
  for (int r = 0; r < rows; r++) {
    taken_back[r] = -w->rounded.rest[r]; /* an estimate of what the second layer brings */
    const float *row = scores + r * w->score_stride;
    float error = w->rounded.error[r], *highest = w->highest + first + r, earlier = *highest;
    if (!(error > accepted)) continue;
    *highest = highest_of(row, L, earlier);
    if (*highest == -INFINITY) continue;
    squares_t *weights = w->weights + first + r;
    float factor = expf(2 * (earlier - *highest));
    weights->sum *= factor, weights->cost *= factor;
    float sum = sum_squares(row, L, *highest), cost = error * error * sum;
    weights->sum += sum;
    if (error < LARGEST_COARSE * accepted && weights->cost + cost < 0.5f * accepted * accepted * weights->sum)
      weights->cost += cost;
    else refine(w, side, r, 0, D);
  }
  for (int64_t t = 0; t < L && w->rounded.coarse_rows; t += CHUNK) {
    target_t target = {.to = scores + t, .stride = w->score_stride, .base = taken_back, .adds = 1};
    if (w->block.has_factor) target.scale = w->block.factor + t;
    multiply_layer(w, 1, 1, w->rounded.coarse_rows, 0, D, t, least(CHUNK, L - t), &target, &ahead);
  }
}
#else
static void multiply(work_t *w, int is_key, int rows, int64_t start, int64_t count, int64_t column, int64_t columns,
                     const target_t *target, const uint8_t **ahead) {
  if ((is_key ? &w->q->key : &w->q->value)->levels) {
    multiply_levels(w, is_key, rows, start, count, column, columns, target, ahead);
    return;
  }
  int64_t inner = is_key ? w->q->key.block_length : w->q->value.head_dim;
  multiply_codes(rows, (int)divide_up(columns, VL), w->folded + start, w->fold_stride, count,
                 w->block.codes + start * inner + column, inner, w->sums, CHUNK, *ahead, w->block.pace);
  for (int r = 0; r < rows; r++) join_row(target, r, w->sums + r * CHUNK, columns, 1.0f, 0.0f, 0);
  *ahead += count * w->block.pace;
}
#endif

/* `hidden_start` to `hidden_end`: tokens of the block that are not attended to. */
static void score_block(work_t *w, const float *query, int64_t offset, int64_t hidden_start, int64_t hidden_end) {
  const side_t *side = &w->q->key;
  const block_t *block = &w->block;
  int64_t L = side->block_length, D = side->head_dim, length = side->per_channel ? D : side->group_length;
  for (int64_t first = 0; first < w->rows; first += MAX_ROWS) {
    int rows = (int)least(MAX_ROWS, w->rows - first);
    const float *q = query + first * D;
    const uint8_t *ahead = block->ahead;
    float constant[MAX_ROWS], *scores = w->scores + first * w->score_stride + offset;
    fold(w, rows, q, D, side->per_channel ? block->scale : NULL, side->per_channel ? block->mid : NULL, D, constant);
    for (int r = 0; r < rows && !side->per_channel; r++)
      for (int64_t g = 0; g < side->groups; g++) {
        float *to = scores + r * w->score_stride, sum = w->query_sums[(first + r) * side->groups + g];
        for (int64_t t = 0; t < L; t++) to[t] = (g ? to[t] : 0.0f) + block->mid[g * L + t] * sum;
      }
    for (int64_t g = 0; g * length < D; g++) {
      const float *scale = side->per_channel ? NULL : block->scale + g * L;
      float unit = scale ? highest_of(scale, L, 0) : 1.0f;
      int64_t end = least(D, (g + 1) * length);
      if (!scale && block->has_factor) scale = block->factor;
      for (int64_t start = g * length; start < end; start += MAX_SUMMED) {
        int64_t count = least(MAX_SUMMED, end - start);
        round_rows(w, side, rows, start, count, unit, w->can_wait);
        for (int64_t t = 0; t < L; t += CHUNK) {
          target_t target = {.to = scores + t, .stride = w->score_stride, .scale = scale ? scale + t : NULL};
          target.base = side->per_channel && start == 0 ? constant : NOTHING;
          target.adds = !side->per_channel || start > 0;
          multiply(w, 1, rows, start, count, t, least(CHUNK, L - t), &target, &ahead);
        }
      }
    }
    for (int r = 0; r < rows; r++) /* before they are accounted for; `weigh` hides them again, behind a cap */
      for (int64_t i = most(0, hidden_start); i < least(L, hidden_end); i++)
        scores[r * w->score_stride + i] = -INFINITY;
#if defined(WHOLE_BYTES)
    if (w->can_wait) refine_scores(w, first, rows, scores);
#endif
  }
}

static void mix_block(work_t *w, int64_t offset) {
  const side_t *side = &w->q->value;
  const block_t *block = &w->block;
  int64_t L = side->block_length, D = side->head_dim, G = side->per_channel ? D : side->group_length;
  for (int64_t first = 0; first < w->rows; first += MAX_ROWS) {
    int rows = (int)least(MAX_ROWS, w->rows - first);
    const float *weights = w->scores + first * w->score_stride + offset;
    const uint8_t *ahead = block->ahead;
    for (int64_t g = 0; g * G < D; g++) {
      const float *scale = side->per_channel ? NULL : block->scale + g * L;
      const float *factors = scale ? scale : block->has_factor ? block->factor : NULL;
      float constant[MAX_ROWS];
      fold(w, rows, weights, w->score_stride, factors, scale ? block->mid + g * L : NULL, L, constant);
      for (int64_t start = 0; start < L; start += MAX_SUMMED) {
        int64_t count = least(MAX_SUMMED, L - start), end = least(D, (g + 1) * G);
        round_rows(w, side, rows, start, count, 0, 0);
        for (int64_t d = g * G; d < end; d += CHUNK) {
          target_t target = {.to = w->stored_sum + first * D + d, .stride = D, .adds = 1};
          const float *once = start ? NOTHING : constant;
          target.base = scale ? once : NOTHING, target.share = once;
          if (!scale) target.scale = block->scale + d, target.mid = block->mid + d;
          multiply(w, 0, rows, start, count, d, least(CHUNK, end - d), &target, &ahead);
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
    for (int64_t i = 0; i < count; i += VL) highest = larger_float(highest, load(scores + i));
    float largest = largest_lane(highest);
    if (largest != w->largest[r]) {
      float factor = expf(w->largest[r] - (largest == -INFINITY ? 0.0f : largest));
      w->total[r] *= factor;
      for (int64_t d = 0; d < Dv; d++) {
        w->stored_sum[r * Dv + d] *= factor;
        w->exact_sum[r * Dv + d] *= factor;
      }
      w->largest[r] = largest;
    }
  }
  for (int64_t r = 0; r < w->rows; r++) { /* apart, so that one row need not wait for another */
    float *scores = w->scores + r * w->score_stride, base = w->largest[r] == -INFINITY ? 0.0f : w->largest[r];
    vf total = {0};
    for (int64_t i = 0; i < count; i += VL) {
      vf weight = exponential(load(scores + i) - base);
      store(scores + i, weight);
      total += weight;
    }
    w->total[r] += sum_fast(total);
  }
}

/* Tokens that are weighed together: whole blocks of both sides, of which `tile_length` is a common multiple. */
static inline int64_t count_tile(const request_t *q) {
  return q->tile_length * most(1, STORED_TILE / q->tile_length);
}

static void attend_tile(work_t *w, cursor_t *keys, cursor_t *values, int64_t position, int64_t count) {
  const request_t *q = w->q;
  int64_t start = 0, end = 0;
  if (q->keys[0].data) {
    start = least(count, most(0, q->sink_starts[w->row] - position));
    end = least(count, most(0, q->sink_starts[w->row] + q->keys[0].length - position));
  }
  for (int64_t t = 0; t < count; t += q->key.block_length) {
    read_block(&q->key, 1, keys, w->row, w->head, q->heads, &w->layouts[1], &w->block);
    score_block(w, w->rotated, t, start - t, end - t);
  }
  weigh(w, position, count, start, end);
  for (int64_t t = 0; t < count; t += q->value.block_length) {
    read_block(&q->value, 0, values, w->row, w->head, q->heads, &w->layouts[0], &w->block);
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

static states_t behind(const states_t *states, int64_t type, int64_t count) {
  states_t left = *states;
  left.data = (const uint8_t *)states->data + size_of(type) * count * states->token_stride;
  left.length = states->length - count;
  return left;
}

/* Those of a row that lie in the store: its first ones may be forgotten, and its last ones not quantized yet. */
static void attend_sinks(work_t *w) {
  const request_t *q = w->q;
  int64_t start = q->sink_starts[w->row], forgotten = least(q->keys[0].length, most(0, -start));
  states_t keys = behind(&q->keys[0], q->key_type, forgotten);
  states_t values = behind(&q->values[0], q->value_type, forgotten);
  start += forgotten;
  attend_exact(w, &keys, &values, start, least(keys.length, most(0, q->stored - start)));
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
    w->weights[r] = (squares_t){0};
    w->highest[r] = -INFINITY;
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
    int64_t end = least(q->stored, last * q->tile_length), step = count_tile(q);
    for (int64_t start = first * q->tile_length; start < end; start += step)
      attend_tile(w, &keys, &values, start, least(step, end - start));
  }
  if (split == q->splits - 1) {
    if (q->keys[0].data) attend_sinks(w);
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
  int64_t stride = most(count_tile(q), EXACT_TILE) + MAX_VECTORS * VL, numbers = most(most(D, Dv), 2 * L * groups);
  int64_t widest = divide_up(most(most(D, Dv), L), 16) * 16;
  int64_t levels = CHUNK * most(q->key.levels ? count_chunks(&q->key, 1) * D : 0,
                                q->value.levels ? count_chunks(&q->value, 0) * q->value.block_length : 0);
  int64_t floats[] = {R * D, R * D, R * groups, MAX_ROWS * widest, MAX_ROWS * most(CHUNK, MAX_VECTORS * VL), R * stride,
                      R * Dv, R * Dv, R, R, R, EXACT_TILE * Dv, numbers, numbers, L,
                      levels};
  int64_t total = 0, count = sizeof floats / sizeof *floats;
  for (int64_t i = 0; i < count; i++) total += (floats[i] = (floats[i] + MAX_VECTORS * VL + 15) / 16 * 16);
  int64_t accounts = divide_up(2 * R, 16) * 16;
  int64_t bytes = 4 * (total + accounts) + L * most(D, Dv) + 4 * most(L, most(D, Dv)) + CHUNK + 64;
#if defined(WHOLE_BYTES)
  bytes += 4 * MAX_ROWS * CHUNK + 2 * LAYERS * MAX_ROWS * widest;
#endif
  void *memory;
  if (posix_memalign(&memory, 64, bytes)) return;
  work_t w = {.q = q, .rows = R, .score_stride = stride, .fold_stride = widest};
  w.layouts[0] = find_layout(&q->value, 0), w.layouts[1] = find_layout(&q->key, 1);
  /* No mask, cap or later query changes a score that was multiplied. */
  w.can_wait = q->key.per_channel && !q->key.levels && D <= MAX_SUMMED && q->softcap == 0 && !q->mask &&
               (!q->is_causal || q->queries <= q->keys[1].length + q->keys[2].length);
  float **places[] = {&w.query, &w.rotated, &w.query_sums, &w.folded, &w.sums, &w.scores, &w.stored_sum, &w.exact_sum,
                      &w.largest, &w.total, &w.highest, &w.states, &w.block.scale, &w.block.mid, &w.block.factor,
                      &w.block.levels};
  float *next = memory;
  for (int64_t i = 0; i < count; i++) *places[i] = next, next += floats[i];
#if defined(WHOLE_BYTES)
  w.totals = (uint32_t *)next, next += MAX_ROWS * CHUNK;
  w.rounded.numbers = (int16_t *)next, next += LAYERS * MAX_ROWS * widest / 2;
  w.rounded.stride = widest;
#endif
  w.weights = (squares_t *)next, next += accounts;
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
