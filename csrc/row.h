// Loss and gradient of one row. No torch in this file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gradient.h"
#include "loops.h"
#include "softmax.h"

namespace distill {

enum Kind { kForwardKl, kReverseKl, kJsd, kTvd };

struct Terms {
  Kind kind;
  double beta, soft_factor, hard_weight;
  double teacher_temperature;  // 0: the arg-max
  double student_temperature;
  int64_t vocab_size;
};

struct Logits {
  const char* data = nullptr;  // columns are contiguous
  Dtype dtype = kFloat;
};

struct SparseTargets {
  const int64_t* ids = nullptr;
  const float* probs = nullptr;  // where 0, there is no entry
  int64_t size = 0;
  double tail = 0;  // mass of all other classes
};

struct Row {
  Logits student, teacher;  // teacher without data: none
  SparseTargets sparse;     // without ids: none
  int64_t label = -1;       // negative: none
  double weight = 1;
  char* grad = nullptr;  // of the student's dtype, vocab_size columns; may be the student's memory
};

struct RowResult {
  double loss = 0, soft = 0, soft_ce = 0, hard = 0;
  bool is_correct = false;
};

class RowKernel {
 public:
  // `scratch`, aligned to 64 bytes, is in use as long as the kernel.
  RowKernel(const Loops& loops, const Terms& terms, float* scratch);
  static int64_t scratch_size(int64_t vocab_size);  // in floats

  RowResult run(const Row& row);

 private:
  struct Moments {
    double log_ratio = 0, cross = 0;  // as in PairSums, of the whole row and without center
  };

  // First sweep: reads each logit once.
  void sweep_student(const Row& row);
  void sweep(const Block& block, int64_t index, Softmax* softmax);
  Moments sweep_both(const Row& row);
  PairSums pair(const Block& s, const Block& t, int64_t index);
  void raise(float student_max, float teacher_max, Moments* moments);
  float center(const Block& s, const Block& t) const;
  void sweep_others(const Row& row);
  bool sweep_for_max(const Logits& row);
  Block read(const Logits& row, int64_t index, bool as_floats, float* buffer) const;

  // What the teacher and the label say of the row; sets the gradient. `scale` is its factor.
  void dense(const Row& row, double scale);
  void mixture(double slope);
  void arg_max(const Row& row, double scale);
  void sparse(const Row& row, double scale);
  void tail(const Row& row, double slope, double entries);
  void hard(const Row& row, double scale);

  float logit(const Logits& row, int64_t column) const;
  int64_t first_max(const Logits& row, const Softmax& softmax) const;

  const Loops& loops_;
  const Terms terms_;
  const int64_t num_blocks_;
  float *student_buffer_, *teacher_buffer_;  // a block each
  bool is_hard_apart_ = false;
  Softmaxes softmaxes_;
  Softmax &student_ = softmaxes_.student, &teacher_ = softmaxes_.teacher;
  std::vector<float> centers_;  // of each block, for the reverse KL
  double center_ = 0;
  Gradient gradient_;
  RowResult result_;
};

}  // namespace distill
