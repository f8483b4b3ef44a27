// The second sweep over a row: the gradient, out of the exps that the first one left in scratch rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "loops.h"
#include "softmax.h"

namespace distill {

// With p, q, p_1 the probabilities of student, teacher, and student at temperature 1: nothing, a p, a p - b q or
// a p (v - c) with v in place of the teacher's exps; plus h p_1; less amounts in single columns.
class Gradient {
 public:
  void start() {
    form_ = kNothing;
    a_ = b_ = c_ = h_ = 0;
    centers_.clear();
    less_.clear();
  }
  void set_difference(double a, double b) { form_ = kDifference, a_ = a, b_ = b; }
  void set_product(double a, double c) { form_ = kProduct, a_ = a, c_ = c; }
  // v is x_s - x_t - the center of the block, each x against its own reference; it stands for log p - log q.
  void set_log_ratio(double a, double c, const std::vector<float>& centers) {
    set_product(a, c);
    centers_ = centers;
  }

  // Adds amount * p to whatever there is, or amount * p_1.
  void add_student(double amount) {
    if (form_ == kProduct) {
      c_ -= amount / a_;
    } else {
      form_ = form_ == kNothing ? kScaled : form_;
      a_ += amount;
    }
  }
  void add_hard(double amount) { h_ += amount; }

  // Takes `amount` off a column; the second serves columns that have none yet.
  void deduct(int64_t column, double amount) {
    for (auto& [known, total] : less_) {
      if (known == column) return void(total += amount);
    }
    deduct_distinct(column, amount);
  }
  void deduct_distinct(int64_t column, double amount) { less_.emplace_back(column, amount); }

  // Writes the columns of a row: those of a dtype from `out` on. `buffer` takes a block.
  void write(const Loops& loops, const Softmaxes& row, int64_t vocab_size, Dtype dtype, char* out,
             float* buffer) const {
    for (int64_t start = 0; start < vocab_size; start += kBlock) {
      const int64_t n = std::min(kBlock, vocab_size - start);
      char* to = out + start * size_of(dtype);
      const bool is_direct = dtype == kFloat && n == kBlock;
      float* floats = is_direct ? reinterpret_cast<float*>(to) : buffer;
      columns(loops, row, start, padded(n), floats);
      if (!is_direct) loops.narrow[dtype](floats, n, to);
    }
    for (const auto& [column, amount] : less_) {  // from the start: rounded once
      const int64_t start = column / kLanes * kLanes;
      columns(loops, row, start, kLanes, buffer);
      buffer[0] = static_cast<float>(buffer[column - start] - amount);
      loops.narrow[dtype](buffer, 1, out + column * size_of(dtype));
    }
  }

 private:
  enum Form { kNothing, kScaled, kDifference, kProduct };

  // Some columns of one block, without deductions.
  void columns(const Loops& loops, const Softmaxes& row, int64_t start, int64_t n, float* out) const {
    const int64_t block = start / kBlock;
    const float *p = row.student.exps + start, *other = row.teacher.exps + start;
    const float a = static_cast<float>(a_ * row.student.factor(block));
    switch (form_) {
      case kNothing:
        std::fill(out, out + n, 0.0f);
        break;
      case kScaled:
        loops.scaled(p, n, a, out);
        break;
      case kDifference:
        loops.difference(p, other, n, a, static_cast<float>(b_ * row.teacher.factor(block)), out);
        break;
      case kProduct:
        loops.product(p, other, n, a, c_ - shift_of_ratio(row, block), out);
    }
    if (h_ != 0) loops.add(row.hard.exps + start, n, static_cast<float>(h_ * row.hard.factor(block)), out);
  }

  double shift_of_ratio(const Softmaxes& row, int64_t block) const {
    if (centers_.empty()) return 0;
    return centers_[static_cast<size_t>(block)] + row.student.log_factor(block) - row.teacher.log_factor(block);
  }

  Form form_ = kNothing;
  double a_ = 0, b_ = 0, c_ = 0, h_ = 0;
  std::vector<float> centers_;
  std::vector<std::pair<int64_t, double>> less_;
};

}  // namespace distill
