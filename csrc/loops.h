// The loops over the columns of a row, one table of them for each instruction set. No torch in this file.
#pragma once

#include <cstdint>
#include <vector>

namespace distill {

enum Dtype { kFloat, kBfloat16, kHalf, kNumDtypes };

constexpr int64_t kBlock = 1024;  // columns handled at a time: a block of both models stays in the first cache
constexpr int64_t kLanes = 16;    // of the widest instruction set; blocks are padded with -inf to a multiple
constexpr float kLowest = -87.0f;  // e^x counts as 0 from just below here, where it leaves the normal floats

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
constexpr int64_t size_of(Dtype dtype) { return dtype == kFloat ? 4 : 2; }

// How logits become x, the argument of exp: logit * scale - reference, rounded once.
struct Argument {
  float scale, reference;
};

// A block of logits, and where in memory the one after it lies: that is fetched while this one is worked on.
struct Block {
  const char* x;
  Dtype dtype;
  int64_t n;  // a multiple of kLanes
  const char* next;
  int64_t next_size;  // bytes a column
};

// Sums over a block, in float, and its largest logits; those pass over NaN.
struct ExpSums {
  float sum, max;
};
struct PairSums {
  float student, teacher;  // of the exponentials e_s, e_t
  float log_ratio;         // e_t * (x_t - x_s); for the reverse KL e_s * (x_s - x_t - center)
  float cross;             // e_t * x_s
  float student_max, teacher_max;
};
struct MixSums {
  float value, mean;
};

// `n` is a multiple of kLanes everywhere but in `widen` and `narrow`. Where a weight is 0 its term is 0, even if a
// logit is infinite; NaN goes through all of them. Scratch rows e_s, e_t are aligned to 64 bytes, logits are not.
struct Loops {
  const char* name;
  // Largest of x; passes over NaN.
  float (*maximum)(const float* x, int64_t n);
  bool (*has_nan)(const float* x, int64_t n);
  // n logits of a dtype as floats, padded with -inf to a multiple of kLanes.
  void (*widen[kNumDtypes])(const char* x, int64_t n, float* out);
  // Rounds to nearest, ties to even.
  void (*narrow[kNumDtypes])(const float* x, int64_t n, char* out);
  // e = exp of x. Of floats, may be done in place. By dtype of the logits.
  ExpSums (*exps[kNumDtypes])(const Block& block, Argument argument, float* e);
  // By dtype of both logits.
  PairSums (*pair[kNumDtypes])(const Block& s, const Block& t, Argument of_s, Argument of_t, float* e_s, float* e_t);
  // As `pair`, but leaves x_s - x_t - center in `ratio`, in place of e_t, and sums that.
  PairSums (*pair_reverse[kNumDtypes])(const Block& s, const Block& t, Argument of_s, Argument of_t, float center,
                                       float* e_s, float* ratio);
  // With p = a e_s, q = b e_t, m = beta q + (1 - beta) p. Leaves v = log(p / m) in e_t and returns the sums of
  // q log(q / m) and p v.
  MixSums (*mix)(const float* e_s, float* e_t, int64_t n, float a, float b, float beta);
  // Leaves v = sign(p - q) in e_t; returns the sums of |p - q| and p v.
  MixSums (*distance)(const float* e_s, float* e_t, int64_t n, float a, float b);
  // out = a e
  void (*scaled)(const float* e, int64_t n, float a, float* out);
  // out += a e
  void (*add)(const float* e, int64_t n, float a, float* out);
  // out = a e_s - b e_t
  void (*difference)(const float* e_s, const float* e_t, int64_t n, float a, float b, float* out);
  // out = a e_s (v - c), with c to more than a float's digits: both are large where the teacher is sharp
  void (*product)(const float* e_s, const float* v, int64_t n, float a, double c, float* out);
};

#if defined(__x86_64__) && defined(__GNUC__)
#define DISTILL_X86 1
extern const Loops kAvx512Loops, kAvx2Loops;
#endif
extern const Loops kPortableLoops;

// The loops this processor can run, best first.
std::vector<const Loops*> available_loops();

}  // namespace distill
