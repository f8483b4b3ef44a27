// A softmax of a row that is read once: its exps, block by block, against about the largest logit so far.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "loops.h"

namespace distill {

constexpr double kNoLogit = -std::numeric_limits<double>::infinity();

class Softmax {
 public:
  float* exps = nullptr;  // of the columns: exp(logit / T - reference so far); a scratch row of the owner
  double sum = 0;         // of the exps so far, against the reference so far

  void start(int64_t num_blocks, double temperature) {
    sum = 0;
    max_ = reference_ = kNoLogit;
    scale_ = static_cast<float>(1 / temperature);
    best_block_ = 0;
    references_.assign(static_cast<size_t>(num_blocks), kNoLogit);
  }

  // Whether the exps of logits up to this one stay far from overflow without another reference.
  bool fits(float largest) const { return largest * static_cast<double>(scale_) <= reference_ + kSlack; }

  // Makes the logit the reference, if it is larger. Returns by how much that rose.
  double raise(float logit) {
    const double reference = static_cast<float>(logit * static_cast<double>(scale_));
    if (!(reference > reference_)) return 0;
    const double rise = reference_ > kNoLogit ? reference - reference_ : 0;
    reference_ = reference;
    sum *= decay(rise);
    return rise;
  }

  // Takes in the exps of a block.
  void add(int64_t block, ExpSums exps_of_block) {
    if (exps_of_block.max > max_) {
      max_ = exps_of_block.max;
      best_block_ = block;
    }
    references_[static_cast<size_t>(block)] = reference_;
    sum += exps_of_block.sum;
  }

  // After the last block. A row of nothing but -inf has no distribution: all that follows is NaN.
  void finish() {
    if (max_ == kNoLogit) sum = std::numeric_limits<double>::quiet_NaN();
    log_sum_ = std::log(sum);
    factors_.resize(references_.size());
    for (size_t i = 0; i < references_.size(); ++i) {
      const bool is_same = i > 0 && references_[i] == references_[i - 1];
      factors_[i] = is_same ? factors_[i - 1] : std::exp(references_[i] - reference_) / sum;
    }
  }

  // What the next exps are made with. While there was nothing but -inf, any reference will do.
  Argument argument() const { return {scale_, static_cast<float>(reference_ > kNoLogit ? reference_ : 0)}; }
  // What a weighted term is multiplied by when its reference rises; 0 where exps are.
  static double decay(double rise) { return rise > -kLowest ? 0 : std::exp(-rise); }

  float max() const { return static_cast<float>(max_); }  // the largest logit
  int64_t best_block() const { return best_block_; }      // the first that holds it
  double log_sum() const { return log_sum_; }
  double log_normaliser() const { return reference_ + log_sum_; }  // log of the sum of exp(logit / T)
  double log_prob(float logit) const { return static_cast<double>(logit) * scale_ - log_normaliser(); }

  // From the exps of a block to probabilities, and from logit / T - reference to log probabilities.
  double factor(int64_t block) const { return factors_[static_cast<size_t>(block)]; }
  double log_factor(int64_t block) const {
    const double reference = references_[static_cast<size_t>(block)];
    return (reference > kNoLogit ? reference - reference_ : 0) - log_sum_;
  }

 private:
  std::vector<double> references_, factors_;  // of each block
  static constexpr double kSlack = 8;

  double max_ = kNoLogit;
  double reference_ = kNoLogit;  // of the exps: about the largest logit / T, as a float
  float scale_ = 1;              // 1 / T
  double log_sum_ = 0;
  int64_t best_block_ = 0;
};

// The distributions of a row. `hard` is the student at temperature 1 where labels need it beside another.
struct Softmaxes {
  Softmax student, teacher, hard;
};

}  // namespace distill
