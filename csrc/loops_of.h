// The loops of loops.h, written once for any instruction set S: a struct with a vector type F of S::kWidth floats
// and the operations on it (isa_portable.cpp has them all in plain C++). Included by the isa_*.cpp alone.
#pragma once

#include "loops.h"

namespace distill {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kSmallest = 1.17549435e-38f;  // normal float

// e^x for K vectors of x < 88, in place, with relative error below 2e-7 + 3e-9 |x|; exactly 0 from kLowest - 0.7 on;
// NaN stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2; e^x = 2^n e^r; the polynomial (minimax) is off by 9e-8. Each step
// is taken for all vectors before the next, so that none has to wait for the one before it.
template <class S, int K>
inline void exp_of(typename S::F (&x)[K]) {
  constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds; 127 is the bias of exponents
  constexpr float kPolynomial[] = {4.189798e-2f, 1.6667637e-1f, 4.9999149e-1f, 9.9999971e-1f, 1.0f};
  typename S::F shifted[K], r[K], p[K];
  for (int k = 0; k < K; ++k) x[k] = S::max(S::set(kLowest - 1), x[k]);
  for (int k = 0; k < K; ++k) shifted[k] = S::fma(x[k], S::set(1.44269504f), S::set(kShift));
  for (int k = 0; k < K; ++k) r[k] = S::minus_n_ln2(x[k], S::sub(shifted[k], S::set(kShift)));
  for (int k = 0; k < K; ++k) p[k] = S::set(8.29031e-3f);
  for (const float c : kPolynomial) {
    for (int k = 0; k < K; ++k) p[k] = S::fma(p[k], r[k], S::set(c));
  }
  for (int k = 0; k < K; ++k) x[k] = S::mul(p[k], S::power_of_two(shifted[k]));  // n = -127 gives 0
}

// log x for normal x > 0 with absolute error below 1e-7 near 1 and relative error below 2e-7 elsewhere (the
// polynomial of Cephes' logf); NaN stays NaN.
template <class S>
inline typename S::F log_positive(typename S::F x) {
  typename S::F exponent;
  const auto f = S::sub(S::mantissa(x, &exponent), S::set(1.0f));  // in sqrt(1/2) - 1 .. sqrt(2) - 1
  const auto square = S::mul(f, f);
  auto p = S::fma(S::set(7.0376836292e-2f), f, S::set(-1.1514610310e-1f));
  constexpr float kRest[] = {1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                             2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  for (const float c : kRest) p = S::fma(p, f, S::set(c));
  p = S::fma(S::mul(f, square), p, S::mul(S::set(-0.5f), square));
  return S::fma(exponent, S::set(0.693147182f), S::add(p, f));
}

template <class S>
struct LoopsOf {
  using F = typename S::F;
  static constexpr int64_t W = S::kWidth;

  static F x_of(F logits, Argument argument) {
    return S::fused_sub(logits, S::set(argument.scale), S::set(argument.reference));
  }

  template <Dtype dtype>
  static F load(const char* x, int64_t i) {
    return S::template load_as<dtype>(x + i * size_of(dtype));
  }

  static float maximum(const float* x, int64_t n) {
    F most = S::set(-kInfinity);
    for (int64_t i = 0; i < n; i += W) most = S::max(S::load(x + i), most);
    return S::horizontal_max(most);
  }

  static bool has_nan(const float* x, int64_t n) {
    F sum = S::set(0);  // 0 * (x clipped to finite) would be 0: only a NaN changes it
    for (int64_t i = 0; i < n; i += W) {
      const F finite = S::max(S::set(-1), S::min(S::set(1), S::load(x + i)));
      sum = S::fma(S::set(0), finite, sum);
    }
    return S::sum(sum) != 0;
  }

  template <Dtype dtype>
  static void widen(const char* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) S::store(out + i, load<dtype>(x, i));
    alignas(64) char rest[W * sizeof(float)] = {};
    __builtin_memcpy(rest, x + i * size_of(dtype), static_cast<size_t>((n - i) * size_of(dtype)));
    if (i < n) S::store(out + i, load<dtype>(rest, 0));
    for (int64_t j = n; j < padded(n); ++j) out[j] = -kInfinity;
  }

  template <Dtype dtype>
  static void narrow(const float* x, int64_t n, char* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) S::template store_as<dtype>(out + i * size_of(dtype), S::load(x + i));
    if (i == n) return;
    alignas(64) char rest[W * sizeof(float)];
    S::template store_as<dtype>(rest, S::load(x + i));
    __builtin_memcpy(out + i * size_of(dtype), rest, static_cast<size_t>((n - i) * size_of(dtype)));
  }

  template <Dtype dtype>
  static ExpSums exps(const Block& block, Argument argument, float* e) {
    constexpr int K = kLanes / W;
    F sum = S::set(0), most = S::set(-kInfinity);
    for (int64_t i = 0; i < block.n; i += K * W) {
      S::fetch(block.next + i * block.next_size);
      F x[K];
      for (int k = 0; k < K; ++k) {
        const F logits = load<dtype>(block.x, i + k * W);
        most = S::max(logits, most);
        x[k] = x_of(logits, argument);
      }
      exp_of<S>(x);
      for (int k = 0; k < K; ++k) {
        S::store(e + i + k * W, x[k]);
        sum = S::add(sum, x[k]);
      }
    }
    return {S::sum(sum), S::horizontal_max(most)};
  }

  template <Dtype dtype>
  static PairSums pair(const Block& s, const Block& t, Argument of_s, Argument of_t, float* e_s, float* e_t) {
    return pair_of<dtype, false>(s, t, of_s, of_t, 0, e_s, e_t);
  }

  template <Dtype dtype>
  static PairSums pair_reverse(const Block& s, const Block& t, Argument of_s, Argument of_t, float center, float* e_s,
                               float* ratio) {
    return pair_of<dtype, true>(s, t, of_s, of_t, center, e_s, ratio);
  }

  template <Dtype dtype, bool reverse>
  static PairSums pair_of(const Block& s, const Block& t, Argument of_s, Argument of_t, float center, float* e_s,
                          float* other) {
    constexpr int K = kLanes / W;  // vectors of each model at a time
    F student = S::set(0), teacher = S::set(0), log_ratio = S::set(0), cross = S::set(0);
    F most_s = S::set(-kInfinity), most_t = S::set(-kInfinity);
    for (int64_t i = 0; i < s.n; i += K * W) {
      S::fetch(s.next + i * s.next_size);
      S::fetch(t.next + i * t.next_size);
      F x[2 * K], e[2 * K];
      for (int k = 0; k < K; ++k) {
        const F logits_s = load<dtype>(s.x, i + k * W), logits_t = load<dtype>(t.x, i + k * W);
        most_s = S::max(logits_s, most_s);
        most_t = S::max(logits_t, most_t);
        e[k] = x[k] = x_of(logits_s, of_s);
        e[K + k] = x[K + k] = x_of(logits_t, of_t);
      }
      exp_of<S>(e);
      for (int k = 0; k < K; ++k) {
        const F p = e[k], q = e[K + k], x_s = x[k], x_t = x[K + k];
        student = S::add(student, p);
        teacher = S::add(teacher, q);
        cross = S::fma(q, S::where_positive(q, x_s), cross);
        if constexpr (reverse) {
          const F ratio = S::where_positive(p, S::sub(x_s, S::add(x_t, S::set(center))));
          log_ratio = S::fma(p, ratio, log_ratio);
          S::store(other + i + k * W, ratio);
        } else {
          log_ratio = S::fma(q, S::where_positive(q, S::sub(x_t, x_s)), log_ratio);
          S::store(other + i + k * W, q);
        }
        S::store(e_s + i + k * W, p);
      }
    }
    return {S::sum(student), S::sum(teacher),           S::sum(log_ratio),
            S::sum(cross),   S::horizontal_max(most_s), S::horizontal_max(most_t)};
  }

  static MixSums mix(const float* e_s, float* e_t, int64_t n, float a, float b, float beta) {
    const F least = S::set(kSmallest);
    F teacher = S::set(0), student = S::set(0);
    for (int64_t i = 0; i < n; i += W) {
      const F p = S::mul(S::set(a), S::load(e_s + i)), q = S::mul(S::set(b), S::load(e_t + i));
      const F m = S::fma(S::set(beta), S::sub(q, p), p);  // exactly p where both agree
      const F inverse = S::div(S::set(1), S::max(least, m));
      const F log_p = log_positive<S>(S::max(least, S::mul(p, inverse)));
      const F log_q = log_positive<S>(S::max(least, S::mul(q, inverse)));
      student = S::fma(p, log_p, student);
      teacher = S::fma(q, log_q, teacher);
      S::store(e_t + i, log_p);
    }
    return {S::sum(teacher), S::sum(student)};
  }

  static MixSums distance(const float* e_s, float* e_t, int64_t n, float a, float b) {
    F total = S::set(0), student = S::set(0);
    for (int64_t i = 0; i < n; i += W) {
      const F p = S::mul(S::set(a), S::load(e_s + i)), q = S::mul(S::set(b), S::load(e_t + i));
      const F difference = S::sub(p, q);
      const F sign = S::max(S::set(-1), S::min(S::set(1), S::mul(difference, S::set(3e38f))));
      total = S::fma(sign, difference, total);
      student = S::fma(sign, p, student);
      S::store(e_t + i, sign);
    }
    return {S::sum(total), S::sum(student)};
  }

  static void scaled(const float* e, int64_t n, float a, float* out) {
    for (int64_t i = 0; i < n; i += W) S::store(out + i, S::mul(S::set(a), S::load(e + i)));
  }

  static void add(const float* e, int64_t n, float a, float* out) {
    for (int64_t i = 0; i < n; i += W) S::store(out + i, S::fma(S::set(a), S::load(e + i), S::load(out + i)));
  }

  static void difference(const float* e_s, const float* e_t, int64_t n, float a, float b, float* out) {
    for (int64_t i = 0; i < n; i += W) {  // not fused, so that equal products leave exactly 0
      S::store(out + i, S::sub(S::mul(S::set(a), S::load(e_s + i)), S::mul(S::set(b), S::load(e_t + i))));
    }
  }

  static void product(const float* e_s, const float* v, int64_t n, float a, double c, float* out) {
    const float high = static_cast<float>(c), low = static_cast<float>(c - high);
    for (int64_t i = 0; i < n; i += W) {
      const F slope = S::sub(S::sub(S::load(v + i), S::set(high)), S::set(low));
      S::store(out + i, S::mul(S::mul(S::set(a), S::load(e_s + i)), slope));
    }
  }

  static constexpr Loops table(const char* name) {
    return {name,
            maximum,
            has_nan,
            {widen<kFloat>, widen<kBfloat16>, widen<kHalf>},
            {narrow<kFloat>, narrow<kBfloat16>, narrow<kHalf>},
            {exps<kFloat>, exps<kBfloat16>, exps<kHalf>},
            {pair<kFloat>, pair<kBfloat16>, pair<kHalf>},
            {pair_reverse<kFloat>, pair_reverse<kBfloat16>, pair_reverse<kHalf>},
            mix,
            distance,
            scaled,
            add,
            difference,
            product};
  }
};

}  // namespace distill
