// Maths of one row of logits: plain loops over contiguous floats that the compiler vectorises (`omp simd` allows it
// to reorder the sums; no OpenMP run time is used). No torch in this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// One clone of each loop per instruction set, chosen when the library is loaded: one binary serves a mixed cluster.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
#define INLINED inline __attribute__((always_inline))

namespace row {

constexpr int64_t kBlock = 2048;  // columns summed in float before the sum goes on in double
constexpr float kLowest = -std::numeric_limits<float>::infinity();

template <class To, class From>
INLINED To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// e^x for x <= 0, relative error below 2e-7 (polynomial 3e-9, the rest is rounding); exactly 0 below -87, where e^x
// would leave the normal floats; NaN stays NaN. Larger x, as +inf, do not occur: logits are shifted by their maximum.
INLINED float exp_negative(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, in two parts to stay exact
  float p = 1.381453999e-03f;
  p = p * r + 8.368745116e-03f;
  p = p * r + 4.166839079e-02f;
  p = p * r + 1.666652040e-01f;
  p = p * r + 4.999999343e-01f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = (bits<uint32_t>(shifted) + 127u) << 23;
  return x < -87.0f ? 0.0f : p * bits<float>(exponent);
}

VECTORISED inline void widen(const uint16_t* bf16, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = bits<float>(static_cast<uint32_t>(bf16[i]) << 16);
}

// Rounds to nearest even; every NaN becomes the quiet one.
VECTORISED inline void narrow(const float* in, uint16_t* bf16, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = bits<uint32_t>(in[i]);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    bf16[i] = static_cast<uint16_t>(in[i] == in[i] ? rounded : 0x7fc0u);
  }
}

VECTORISED inline float maximum(const float* x, int64_t n) {
  float m = kLowest;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// e[i] = exp((x[i] - max) * scale); returns their sum.
VECTORISED inline double exponentials(const float* x, float max, float scale, float* e, int64_t n) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = start + kBlock < n ? start + kBlock : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; ++i) {
      const float value = exp_negative((x[i] - max) * scale);
      e[i] = value;
      sum += value;
    }
    total += sum;
  }
  return total;
}

struct Moments {
  double excess = 0;   // sum of e_t * (scaled teacher logit - scaled student logit), both shifted by their maximum
  double student = 0;  // sum of e_t * scaled, shifted student logit
};

// Weighted by the teacher's exponentials. Where those are 0 the term is 0, even if a logit is -inf.
VECTORISED inline Moments moments(const float* s, float s_max, float s_scale, const float* t, float t_max,
                                  float t_scale, const float* e_t, int64_t n) {
  Moments total;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = start + kBlock < n ? start + kBlock : n;
    float excess = 0, student = 0;
#pragma omp simd reduction(+ : excess, student)
    for (int64_t i = start; i < stop; ++i) {
      const float s_i = (s[i] - s_max) * s_scale, t_i = (t[i] - t_max) * t_scale;
      const bool given = e_t[i] > 0.0f;
      excess += given ? e_t[i] * (t_i - s_i) : 0.0f;
      student += given ? e_t[i] * s_i : 0.0f;
    }
    total.excess += excess;
    total.student += student;
  }
  return total;
}

VECTORISED inline void add(float a, const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += a * x[i];
}

VECTORISED inline void difference(float a, const float* x, float b, const float* y, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = a * x[i] - b * y[i];
}

inline int64_t first_index(const float* x, float value, int64_t n) {
  int64_t i = 0;
  while (i + 1 < n && x[i] != value) ++i;
  return i;
}

}  // namespace row
