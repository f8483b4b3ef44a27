// AVX-512 as of the x86-64-v4 level: F, BW, DQ and VL.
#include "loops.h"

#ifdef DISTILL_X86
#include <immintrin.h>
// After the headers of the library, whose inline functions must run on any processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12's own header starts its undefined vectors from themselves
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "loops_of.h"

namespace distill {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int64_t kWidth = 16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* out, F x) { _mm512_storeu_ps(out, x); }
  static void fetch(const char* address) { _mm_prefetch(address, _MM_HINT_T0); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fused_sub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  // Rounded once; the float nearest to ln 2 is off by 2e-9 only.
  static F minus_n_ln2(F x, F n) { return fma(n, set(-0.693147182f), x); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F where_positive(F weight, F x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_GT_OQ), x);
  }

  static F power_of_two(F shifted) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
  }

  static F mantissa(F x, F* exponent) {
    const __m512i root = _mm512_set1_epi32(0x3f3504f3);  // sqrt(1/2)
    const __m512i offset = _mm512_sub_epi32(_mm512_castps_si512(x), root);
    *exponent = _mm512_cvtepi32_ps(_mm512_srai_epi32(offset, 23));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(offset, _mm512_set1_epi32(0x7fffff)), root));
  }

  static float sum(F x) { return _mm512_reduce_add_ps(x); }
  static float horizontal_max(F x) { return _mm512_reduce_max_ps(x); }

  template <Dtype dtype>
  static F load_as(const void* x) {
    if constexpr (dtype == kFloat) return load(static_cast<const float*>(x));
    const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(x));
    if constexpr (dtype == kHalf) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  template <Dtype dtype>
  static void store_as(void* out, F x) {
    if constexpr (dtype == kFloat) return store(static_cast<float*>(out), x);
    const __m256i bits = dtype == kHalf ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : bfloat16(x);
    _mm256_storeu_si256(static_cast<__m256i*>(out), bits);
  }

  // Rounds to nearest even; every NaN becomes the quiet one.
  static __m256i bfloat16(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(up, is_nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
};

}  // namespace

const Loops kAvx512Loops = LoopsOf<Avx512>::table("avx512");

}  // namespace distill

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
