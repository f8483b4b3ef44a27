// Plain C++ for any processor; a compiler makes of it what it can.
#include <cstring>

#include "loops_of.h"

namespace distill {
namespace {

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

struct Portable {
  static constexpr int64_t kWidth = 8;

  struct F {
    float lane[kWidth];
  };

  template <class Operation>
  static F each(Operation operation) {
    F result;
    for (int64_t i = 0; i < kWidth; ++i) result.lane[i] = operation(i);
    return result;
  }

  static F set(float x) {
    return each([=](int64_t) { return x; });
  }
  static F load(const float* x) {
    return each([=](int64_t i) { return x[i]; });
  }
  static void store(float* out, const F& x) { std::memcpy(out, x.lane, sizeof(F)); }
  static void fetch(const char*) {}  // a hint to the cache, of which C++ knows none
  static F add(const F& a, const F& b) {
    return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  static F sub(const F& a, const F& b) {
    return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
  }
  static F mul(const F& a, const F& b) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  static F div(const F& a, const F& b) {
    return each([&](int64_t i) { return a.lane[i] / b.lane[i]; });
  }
  // Rounded twice, so that below the ln 2 has two parts; n * 355 / 512 is exact.
  static F fma(const F& a, const F& b, const F& c) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // a * b - c, rounded once.
  static F fused_sub(const F& a, const F& b, const F& c) {
    return each([&](int64_t i) {
      return static_cast<float>(static_cast<double>(a.lane[i]) * b.lane[i] - c.lane[i]);
    });
  }
  static F minus_n_ln2(const F& x, const F& n) {
    return fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
  }
  // Of two numbers of which one is NaN, min and max give the second.
  static F min(const F& a, const F& b) {
    return each([&](int64_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F max(const F& a, const F& b) {
    return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  // x, or 0 where the weight is 0 or NaN, whatever x is.
  static F where_positive(const F& weight, const F& x) {
    return each([&](int64_t i) { return weight.lane[i] > 0 ? x.lane[i] : 0.0f; });
  }

  // The low bits of an integer that was made by adding 1.5 * 2^23, as the exponent of a float.
  static F power_of_two(const F& shifted) {
    return each([&](int64_t i) { return bits<float>(bits<uint32_t>(shifted.lane[i]) << 23); });
  }

  // x = mantissa * 2^exponent with the mantissa in sqrt(1/2)..sqrt(2), for normal x > 0.
  static F mantissa(const F& x, F* exponent) {
    constexpr uint32_t root = 0x3f3504f3;  // sqrt(1/2)
    *exponent = each([&](int64_t i) {
      return static_cast<float>(static_cast<int32_t>(bits<uint32_t>(x.lane[i]) - root) >> 23);
    });
    return each([&](int64_t i) {
      return bits<float>(((bits<uint32_t>(x.lane[i]) - root) & 0x7fffffu) + root);
    });
  }

  static float sum(const F& x) {
    float total = 0;
    for (float value : x.lane) total += value;
    return total;
  }
  static float horizontal_max(const F& x) {
    float most = x.lane[0];
    for (float value : x.lane) most = value > most ? value : most;
    return most;
  }

  template <Dtype dtype>
  static F load_as(const void* x) {
    if constexpr (dtype == kFloat) return load(static_cast<const float*>(x));
    uint16_t from[kWidth];
    std::memcpy(from, x, sizeof(from));
    if constexpr (dtype == kHalf) return each([&](int64_t i) { return float_of_half(from[i]); });
    return each([&](int64_t i) { return bits<float>(static_cast<uint32_t>(from[i]) << 16); });
  }

  template <Dtype dtype>
  static void store_as(void* out, const F& x) {
    if constexpr (dtype == kFloat) return store(static_cast<float*>(out), x);
    uint16_t to[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) to[i] = dtype == kHalf ? half(x.lane[i]) : bfloat16(x.lane[i]);
    std::memcpy(out, to, sizeof(to));
  }

  static uint16_t bfloat16(float x) {
    const uint32_t b = bits<uint32_t>(x);
    return static_cast<uint16_t>(x == x ? (b + 0x7fffu + ((b >> 16) & 1u)) >> 16 : 0x7fc0u);
  }

  // Exponent and mantissa are moved into place and the bias is corrected by a product, which also serves the
  // subnormal numbers; infinity and NaN are those from 2^16 on after that.
  static float float_of_half(uint16_t x) {
    const float magnitude = bits<float>(static_cast<uint32_t>(x & 0x7fffu) << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;
    return bits<float>(bits<uint32_t>(magnitude) | special | static_cast<uint32_t>(x & 0x8000u) << 16);
  }

  // To nearest even. Below 2^-14, the smallest normal, adding 0.5 rounds at the place of the subnormal numbers.
  static uint16_t half(float x) {
    const uint32_t sign = bits<uint32_t>(x) >> 31 << 15, b = bits<uint32_t>(x) & 0x7fffffffu;
    if (b > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (b >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more become infinity
    const uint32_t tiny = bits<uint32_t>(bits<float>(b) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (b - 0x38000000u + 0xfffu + ((b >> 13) & 1u)) >> 13;
    return static_cast<uint16_t>(sign | (b < 0x38800000u ? tiny : normal));
  }
};

}  // namespace

const Loops kPortableLoops = LoopsOf<Portable>::table("portable");

}  // namespace distill
