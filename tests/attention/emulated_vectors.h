/* AVX-512 with VNNI, or AVX-VNNI, or ARM's dot products, for an x86 processor without them: what attend.c calls, lane
 * by lane as Intel's Intrinsics Guide and ARM's Neon Intrinsics Reference define it. Included before attend.c;
 * EMULATE_AVX_VNNI chooses the second and EMULATE_ARM the third. What is called in unrolled loops is not inlined: the
 * compiler would take minutes. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define KVQ_EMULATED

static inline int32_t emulated_products(int32_t sum, const int16_t *a, const int16_t *b) {
  return (int32_t)((uint32_t)sum + (uint32_t)(a[0] * b[0]) + (uint32_t)(a[1] * b[1]));
}

#if defined(EMULATE_ARM)
#define DOT_PRODUCTS
typedef int8_t int8x8_t __attribute__((vector_size(8)));
typedef int8_t int8x16_t __attribute__((vector_size(16)));
typedef uint8_t uint8x16_t __attribute__((vector_size(16)));
typedef uint16_t uint16x8_t __attribute__((vector_size(16)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));
typedef float float32x4_t __attribute__((vector_size(16)));

static inline int8x8_t vld1_s8(const int8_t *from) {
  int8x8_t result;
  memcpy(&result, from, 8);
  return result;
}
static __attribute__((noinline)) int32x4_t vdotq_lane_s32(int32x4_t sums, int8x16_t a, int8x8_t b, int lane) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) sums[i] = (int32_t)((uint32_t)sums[i] + (uint32_t)(a[4 * i + j] * b[4 * lane + j]));
  return sums;
}
static inline uint8x16_t emulated_zip_u8(uint8x16_t a, uint8x16_t b, int from) {
  uint8x16_t result;
  for (int i = 0; i < 8; i++) result[2 * i] = a[from + i], result[2 * i + 1] = b[from + i];
  return result;
}
static inline uint16x8_t emulated_zip_u16(uint16x8_t a, uint16x8_t b, int from) {
  uint16x8_t result;
  for (int i = 0; i < 4; i++) result[2 * i] = a[from + i], result[2 * i + 1] = b[from + i];
  return result;
}
static inline int32x4_t vcvtnq_s32_f32(float32x4_t x) {
  int32x4_t result;
  for (int i = 0; i < 4; i++) result[i] = _mm_cvtss_si32(_mm_set_ss(x[i]));
  return result;
}
#define vzip1q_u8(a, b) emulated_zip_u8(a, b, 0)
#define vzip2q_u8(a, b) emulated_zip_u8(a, b, 8)
#define vzip1q_u16(a, b) emulated_zip_u16(a, b, 0)
#define vzip2q_u16(a, b) emulated_zip_u16(a, b, 4)
#elif defined(EMULATE_AVX_VNNI)
#define __AVXVNNI__ 1
static __attribute__((noinline)) __m256i emulated_dpwssd_256(__m256i sum, __m256i a, __m256i b) {
  int32_t sums[8];
  int16_t left[16], right[16];
  memcpy(sums, &sum, 32), memcpy(left, &a, 32), memcpy(right, &b, 32);
  for (int i = 0; i < 8; i++) sums[i] = emulated_products(sums[i], left + 2 * i, right + 2 * i);
  memcpy(&sum, sums, 32);
  return sum;
}
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd_256
#else
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VNNI__ 1
typedef int32_t emulated_m512i __attribute__((vector_size(64)));
typedef float emulated_m512 __attribute__((vector_size(64)));
#define __m512i emulated_m512i
#define __m512 emulated_m512

static __attribute__((noinline)) emulated_m512i emulated_unpack(emulated_m512i a, emulated_m512i b, int from) {
  int16_t left[32], right[32], result[32];
  memcpy(left, &a, 64), memcpy(right, &b, 64);
  for (int lane = 0; lane < 32; lane += 8)
    for (int i = 0; i < 4; i++) {
      result[lane + 2 * i] = left[lane + from + i];
      result[lane + 2 * i + 1] = right[lane + from + i];
    }
  memcpy(&a, result, 64);
  return a;
}
static __attribute__((noinline)) emulated_m512i emulated_dpwssd(emulated_m512i sum, emulated_m512i a,
                                                                emulated_m512i b) {
  int16_t left[32], right[32];
  memcpy(left, &a, 64), memcpy(right, &b, 64);
  for (int i = 0; i < 16; i++) sum[i] = emulated_products(sum[i], left + 2 * i, right + 2 * i);
  return sum;
}
static inline emulated_m512i emulated_repeat(const void *bytes, size_t size) {
  emulated_m512i result;
  for (size_t i = 0; i < 64; i += size) memcpy((char *)&result + i, bytes, size);
  return result;
}
static inline emulated_m512i emulated_set1_epi64(int64_t x) { return emulated_repeat(&x, 8); }
static inline emulated_m512i emulated_broadcast_128(__m128i x) { return emulated_repeat(&x, 16); }
static inline emulated_m512i emulated_broadcast_256(__m256i x) { return emulated_repeat(&x, 32); }
static inline emulated_m512i emulated_max_epi32(emulated_m512i a, emulated_m512i b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
static inline emulated_m512 emulated_max_ps(emulated_m512 a, emulated_m512 b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
static inline float emulated_reduce_max_ps(emulated_m512 x) {
  for (int i = 1; i < 16; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
  return x[0];
}
static inline float emulated_reduce_add_ps(emulated_m512 x) {
  for (int i = 1; i < 16; i++) x[0] += x[i];
  return x[0];
}
static inline int32_t emulated_reduce_add_epi32(emulated_m512i x) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += (uint32_t)x[i];
  return (int32_t)sum;
}
static inline emulated_m512 emulated_unpack_ps(emulated_m512 a, emulated_m512 b, int from) {
  emulated_m512 result;
  for (int lane = 0; lane < 16; lane += 4)
    for (int i = 0; i < 2; i++) {
      result[lane + 2 * i] = a[lane + from + i];
      result[lane + 2 * i + 1] = b[lane + from + i];
    }
  return result;
}
static inline emulated_m512 emulated_shuffle_f32x4(emulated_m512 a, emulated_m512 b, int places) {
  emulated_m512 result;
  for (int i = 0; i < 16; i++) {
    int place = places >> i / 4 * 2 & 3;
    result[i] = i < 8 ? a[place * 4 + i % 4] : b[place * 4 + i % 4];
  }
  return result;
}
static inline emulated_m512 emulated_cvtepi32_ps(emulated_m512i x) {
  emulated_m512 result;
  for (int i = 0; i < 16; i++) result[i] = (float)x[i];
  return result;
}
static inline emulated_m512i emulated_cvtps_epi32(emulated_m512 x) {
  emulated_m512i result;
  for (int i = 0; i < 16; i++) result[i] = _mm_cvtss_si32(_mm_set_ss(x[i]));
  return result;
}
static inline __m256i emulated_cvtepi32_epi16(emulated_m512i x) {
  int16_t result[16];
  for (int i = 0; i < 16; i++) result[i] = (int16_t)x[i];
  return _mm256_loadu_si256((const __m256i *)result);
}
static inline emulated_m512i emulated_cvtepu8_epi32(__m128i x) {
  uint8_t bytes[16];
  memcpy(bytes, &x, 16);
  emulated_m512i result;
  for (int i = 0; i < 16; i++) result[i] = bytes[i];
  return result;
}
static inline emulated_m512 emulated_permutexvar_ps(emulated_m512i place, emulated_m512 x) {
  emulated_m512 result;
  for (int i = 0; i < 16; i++) result[i] = x[place[i] & 15];
  return result;
}
static inline emulated_m512 emulated_cvtph_ps(__m256i x) {
  __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  emulated_m512 result;
  memcpy(&result, halves, 64);
  return result;
}
#define _mm512_unpacklo_epi16(a, b) emulated_unpack(a, b, 0)
#define _mm512_unpackhi_epi16(a, b) emulated_unpack(a, b, 4)
#define _mm512_dpwssd_epi32 emulated_dpwssd
#define _mm512_madd_epi16(a, b) emulated_dpwssd((emulated_m512i){0}, a, b)
#define _mm512_set1_epi64 emulated_set1_epi64
#define _mm512_broadcast_i32x4 emulated_broadcast_128
#define _mm512_broadcast_i64x4 emulated_broadcast_256
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_max_ps emulated_max_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_unpacklo_ps(a, b) emulated_unpack_ps(a, b, 0)
#define _mm512_unpackhi_ps(a, b) emulated_unpack_ps(a, b, 2)
#define _mm512_shuffle_f32x4 emulated_shuffle_f32x4
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_permutexvar_ps emulated_permutexvar_ps
#endif
