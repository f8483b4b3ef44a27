// AVX2 with FMA and F16C: processors since about 2013.
#include "loops.h"

#ifdef DISTILL_X86
#include <immintrin.h>
// After the headers of the library, whose inline functions must run on any processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "loops_of.h"

namespace distill {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int64_t kWidth = 8;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* out, F x) { _mm256_storeu_ps(out, x); }
  static void fetch(const char* address) { _mm_prefetch(address, _MM_HINT_T0); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fused_sub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  // Rounded once; the float nearest to ln 2 is off by 2e-9 only.
  static F minus_n_ln2(F x, F n) { return fma(n, set(-0.693147182f), x); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F where_positive(F weight, F x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(weight, _mm256_setzero_ps(), _CMP_GT_OQ));
  }

  static F power_of_two(F shifted) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  }

  static F mantissa(F x, F* exponent) {
    const __m256i root = _mm256_set1_epi32(0x3f3504f3);  // sqrt(1/2)
    const __m256i offset = _mm256_sub_epi32(_mm256_castps_si256(x), root);
    *exponent = _mm256_cvtepi32_ps(_mm256_srai_epi32(offset, 23));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_and_si256(offset, _mm256_set1_epi32(0x7fffff)), root));
  }

  static float sum(F x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static float horizontal_max(F x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  template <Dtype dtype>
  static F load_as(const void* x) {
    if constexpr (dtype == kFloat) return load(static_cast<const float*>(x));
    const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(x));
    if constexpr (dtype == kHalf) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  template <Dtype dtype>
  static void store_as(void* out, F x) {
    if constexpr (dtype == kFloat) return store(static_cast<float*>(out), x);
    const __m128i bits = dtype == kHalf ? _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : bfloat16(x);
    _mm_storeu_si128(static_cast<__m128i*>(out), bits);
  }

  // Rounds to nearest even; every NaN becomes the quiet one.
  static __m128i bfloat16(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  }
};

}  // namespace

const Loops kAvx2Loops = LoopsOf<Avx2>::table("avx2");

}  // namespace distill

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
