#include "row.h"

#include <cmath>
#include <limits>

namespace distill {
namespace {

// A sum of weighted terms after the reference of its weights rose and all terms changed by `change`.
double moved(double sum, double weights, double change, double rise) {
  const double decay = Softmax::decay(rise);
  if (decay == 0) return 0;  // even if a term was infinite
  return (change == 0 ? sum : sum + weights * change) * decay;
}

const float* floats(const Block& block) { return reinterpret_cast<const float*>(block.x); }

}  // namespace

RowKernel::RowKernel(const Loops& loops, const Terms& terms, float* scratch)
    : loops_(loops), terms_(terms), num_blocks_((terms.vocab_size + kBlock - 1) / kBlock) {
  const int64_t width = padded(terms.vocab_size);
  student_buffer_ = scratch;
  teacher_buffer_ = student_buffer_ + kBlock;
  student_.exps = teacher_buffer_ + kBlock;
  teacher_.exps = student_.exps + width;
  softmaxes_.hard.exps = teacher_.exps + width;
}

int64_t RowKernel::scratch_size(int64_t vocab_size) { return 2 * kBlock + 3 * padded(vocab_size); }

RowResult RowKernel::run(const Row& row) {
  result_ = RowResult();
  gradient_.start();
  student_.start(num_blocks_, terms_.student_temperature);
  const double soft_scale = row.weight * terms_.soft_factor, hard_scale = row.weight * terms_.hard_weight;
  is_hard_apart_ = row.label >= 0 && terms_.student_temperature != 1;
  if (is_hard_apart_) softmaxes_.hard.start(num_blocks_, 1);

  if (row.sparse.ids != nullptr) {
    sparse(row, soft_scale);
  } else if (row.teacher.data != nullptr) {
    terms_.teacher_temperature > 0 ? dense(row, soft_scale) : arg_max(row, soft_scale);
  } else if (row.label >= 0) {
    sweep_student(row);
  }
  if (row.label >= 0) hard(row, hard_scale);
  // A weight of 0 switches its term off even if that is infinite.
  result_.loss = (soft_scale != 0 ? soft_scale * result_.soft : 0) + (hard_scale != 0 ? hard_scale * result_.hard : 0);
  if (row.grad != nullptr) {
    gradient_.write(loops_, softmaxes_, terms_.vocab_size, row.student.dtype, row.grad, student_buffer_);
  }
  return result_;
}

// As it lies in memory if that can be, else as floats in the buffer.
Block RowKernel::read(const Logits& row, int64_t index, bool as_floats, float* buffer) const {
  const int64_t start = index * kBlock, n = std::min(kBlock, terms_.vocab_size - start), size = size_of(row.dtype);
  const char* from = row.data + start * size;
  // The block after the last is the next row's first, most often; fetching what is not there does no harm.
  const char* next = from + n * size;
  if (n == kBlock && (row.dtype == kFloat || !as_floats)) return {from, row.dtype, n, next, size};
  loops_.widen[row.dtype](from, n, buffer);
  return {reinterpret_cast<const char*>(buffer), kFloat, padded(n), next, size};
}

// The first block is looked through for its largest logit, which is the reference of all later ones unless they
// hold one that is far above.
void RowKernel::sweep(const Block& block, int64_t index, Softmax* softmax) {
  float* e = softmax->exps + index * kBlock;
  if (index == 0) softmax->raise(loops_.maximum(floats(block), block.n));
  ExpSums sums = loops_.exps[block.dtype](block, softmax->argument(), e);
  if (!softmax->fits(sums.max)) {
    softmax->raise(sums.max);
    sums = loops_.exps[block.dtype](block, softmax->argument(), e);
  }
  softmax->add(index, sums);
}

void RowKernel::sweep_student(const Row& row) {
  for (int64_t index = 0; index < num_blocks_; ++index) {
    const Block s = read(row.student, index, index == 0, student_buffer_);
    sweep(s, index, &student_);
    if (is_hard_apart_) sweep(s, index, &softmaxes_.hard);
  }
  student_.finish();
  if (is_hard_apart_) softmaxes_.hard.finish();
}

RowKernel::Moments RowKernel::sweep_both(const Row& row) {
  teacher_.start(num_blocks_, terms_.teacher_temperature);
  centers_.resize(static_cast<size_t>(num_blocks_));
  Moments moments;
  for (int64_t index = 0; index < num_blocks_; ++index) {
    const bool as_floats = index == 0 || row.student.dtype != row.teacher.dtype;
    const Block s = read(row.student, index, as_floats, student_buffer_);
    const Block t = read(row.teacher, index, as_floats, teacher_buffer_);
    if (index == 0) {
      raise(loops_.maximum(floats(s), s.n), loops_.maximum(floats(t), t.n), &moments);
      center_ = terms_.kind == kReverseKl ? center(s, t) : 0;
    }
    PairSums sums = pair(s, t, index);
    if (!student_.fits(sums.student_max) || !teacher_.fits(sums.teacher_max)) {
      raise(sums.student_max, sums.teacher_max, &moments);
      sums = pair(s, t, index);
    }
    student_.add(index, {sums.student, sums.student_max});
    teacher_.add(index, {sums.teacher, sums.teacher_max});
    moments.log_ratio += sums.log_ratio + static_cast<double>(sums.student) * centers_[static_cast<size_t>(index)];
    moments.cross += sums.cross;
    if (is_hard_apart_) sweep(s, index, &softmaxes_.hard);
  }
  student_.finish();
  teacher_.finish();
  if (is_hard_apart_) softmaxes_.hard.finish();
  return moments;
}

PairSums RowKernel::pair(const Block& s, const Block& t, int64_t index) {
  float *e_s = student_.exps + index * kBlock, *e_t = teacher_.exps + index * kBlock;
  const float center = static_cast<float>(center_);
  centers_[static_cast<size_t>(index)] = center;
  if (terms_.kind != kReverseKl) return loops_.pair[s.dtype](s, t, student_.argument(), teacher_.argument(), e_s, e_t);
  return loops_.pair_reverse[s.dtype](s, t, student_.argument(), teacher_.argument(), center, e_s, e_t);
}

// Moves both references and what was summed against them.
void RowKernel::raise(float student_max, float teacher_max, Moments* moments) {
  const double student_sum = student_.sum, teacher_sum = teacher_.sum;
  const double s_rise = student_.raise(student_max), t_rise = teacher_.raise(teacher_max);
  moments->log_ratio = terms_.kind == kReverseKl ? moved(moments->log_ratio, student_sum, t_rise - s_rise, s_rise)
                                                 : moved(moments->log_ratio, teacher_sum, s_rise - t_rise, t_rise);
  moments->cross = moved(moments->cross, teacher_sum, -s_rise, t_rise);
  if (terms_.kind == kReverseKl) center_ += t_rise - s_rise;
}

// The log ratio at the student's largest logit of the first block. Around it the gradient of the reverse KL, a
// difference of log ratios and their mean, keeps its digits when a sharp teacher makes both large.
float RowKernel::center(const Block& s, const Block& t) const {
  int64_t i = 0;
  const float max = loops_.maximum(floats(s), s.n);
  while (i + 1 < s.n && floats(s)[i] != max) ++i;
  const Argument of_s = student_.argument(), of_t = teacher_.argument();
  const float x_s = floats(s)[i] * of_s.scale - of_s.reference, x_t = floats(t)[i] * of_t.scale - of_t.reference;
  return std::isfinite(x_s - x_t) ? x_s - x_t : 0;
}

void RowKernel::dense(const Row& row, double scale) {
  const Moments moments = sweep_both(row);
  const double log_ratio_of_sums = student_.log_sum() - teacher_.log_sum();
  const double slope = scale / terms_.student_temperature;
  result_.soft_ce = student_.log_sum() - moments.cross / teacher_.sum;
  if (terms_.kind == kForwardKl) {
    result_.soft = moments.log_ratio / teacher_.sum + log_ratio_of_sums;
    if (scale != 0) gradient_.set_difference(slope, slope);
  } else if (terms_.kind == kReverseKl) {
    result_.soft = moments.log_ratio / student_.sum - log_ratio_of_sums;
    if (scale != 0) gradient_.set_log_ratio(slope, result_.soft, centers_);
  } else {
    mixture(slope);
  }
}

// JSD and TVD need both sums before their own: a sweep of the scratch rows in between.
void RowKernel::mixture(double slope) {
  double value = 0, mean = 0;  // sums of q log(q / m) or |p - q|, and of p v
  for (int64_t block = 0; block < num_blocks_; ++block) {
    const int64_t start = block * kBlock, n = padded(std::min(kBlock, terms_.vocab_size - start));
    const float *p = student_.exps + start;
    float* q = teacher_.exps + start;
    const float a = static_cast<float>(student_.factor(block)), b = static_cast<float>(teacher_.factor(block));
    const MixSums sums = terms_.kind == kJsd ? loops_.mix(p, q, n, a, b, static_cast<float>(terms_.beta))
                                             : loops_.distance(p, q, n, a, b);
    value += sums.value;
    mean += sums.mean;
  }
  const double beta = terms_.beta;
  result_.soft = terms_.kind == kJsd ? beta * value + (1 - beta) * mean : value / 2;
  if (slope != 0) gradient_.set_product(slope * (terms_.kind == kJsd ? 1 - beta : 0.5), mean);
}

// The teacher is one class: every divergence is a function f of its log probability, and its gradient that of the
// cross-entropy times a number of the row.
void RowKernel::arg_max(const Row& row, double scale) {
  sweep_student(row);
  const bool is_known = sweep_for_max(row.teacher);
  const int64_t best = first_max(row.teacher, teacher_);
  const double log_p = is_known ? student_.log_prob(logit(row.student, best)) : std::nan("");
  const double p = std::exp(log_p), rest = -std::expm1(log_p);
  double slope = 1;
  result_.soft = result_.soft_ce = -log_p;
  if (terms_.kind == kTvd) {
    result_.soft = rest;
    slope = p;
  } else if (terms_.kind == kJsd) {
    const double beta = terms_.beta, log_m = std::log(beta + (1 - beta) * p), log_rest = std::log1p(-beta);
    const double inside = p == 0 ? 0 : p * (log_p - log_m);
    result_.soft = -beta * log_m + (1 - beta) * (inside - rest * log_rest);
    slope = -(1 - beta) * (inside + p * log_rest);
  }
  if (scale == 0) return;
  gradient_.add_student(scale * slope);
  gradient_.deduct(best, scale * slope);
}

bool RowKernel::sweep_for_max(const Logits& row) {
  teacher_.start(num_blocks_, 1);
  bool is_known = true;
  for (int64_t index = 0; index < num_blocks_; ++index) {
    const Block t = read(row, index, true, teacher_buffer_);
    teacher_.add(index, {0, loops_.maximum(floats(t), t.n)});
    is_known = is_known && !loops_.has_nan(floats(t), t.n);
  }
  return is_known && std::isfinite(teacher_.max());
}

void RowKernel::sparse(const Row& row, double scale) {
  sweep_student(row);
  const SparseTargets& targets = row.sparse;
  const double slope = scale / terms_.student_temperature;
  double sum = 0;
  for (int64_t k = 0; k < targets.size; ++k) {
    const double q = targets.probs[k];
    if (q == 0) continue;
    const double log_p = student_.log_prob(logit(row.student, targets.ids[k]));
    result_.soft += q * (std::log(q) - log_p);
    result_.soft_ce -= q * log_p;
    sum += q;
    if (slope != 0) gradient_.deduct_distinct(targets.ids[k], slope * q);
  }
  if (targets.tail != 0) {
    tail(row, slope, sum);
  } else if (slope != 0) {
    gradient_.add_student(slope * sum);
  }
}

// With R the student's mass outside the entries, log R is a difference of two log-sum-exps, so that its gradient is
// softmax(the others) - p. Made from their own softmax, as 1 - sum p_k would lose all digits of a small R.
void RowKernel::tail(const Row& row, double slope, double entries) {
  sweep_others(row);
  const double mass = row.sparse.tail;
  const bool is_empty = teacher_.max() == kNoLogit;
  const double log_rest = is_empty ? kNoLogit : teacher_.log_normaliser() - student_.log_normaliser();
  result_.soft += mass * (std::log(mass) - log_rest);
  result_.soft_ce -= mass * log_rest;
  if (slope != 0) gradient_.set_difference(slope * (entries + mass), slope * mass);
}

// The student's softmax without the entries, in place of a teacher's.
void RowKernel::sweep_others(const Row& row) {
  teacher_.start(num_blocks_, terms_.student_temperature);
  loops_.widen[row.student.dtype](row.student.data, terms_.vocab_size, teacher_.exps);
  for (int64_t k = 0; k < row.sparse.size; ++k) {
    if (row.sparse.probs[k] != 0) teacher_.exps[row.sparse.ids[k]] = static_cast<float>(kNoLogit);
  }
  for (int64_t index = 0; index < num_blocks_; ++index) {
    const int64_t start = index * kBlock, n = padded(std::min(kBlock, terms_.vocab_size - start));
    const char* x = reinterpret_cast<const char*>(teacher_.exps + start);
    teacher_.raise(loops_.maximum(teacher_.exps + start, n));  // before, as the logits are written over
    sweep({x, kFloat, n, x, 0}, index, &teacher_);
  }
  teacher_.finish();
}

void RowKernel::hard(const Row& row, double scale) {
  const Softmax& softmax = is_hard_apart_ ? softmaxes_.hard : student_;
  const float value = logit(row.student, row.label);
  result_.hard = -softmax.log_prob(value);
  result_.is_correct = value == softmax.max() && first_max(row.student, softmax) == row.label;
  if (scale == 0) return;
  is_hard_apart_ ? gradient_.add_hard(scale) : gradient_.add_student(scale);
  gradient_.deduct(row.label, scale);
}

float RowKernel::logit(const Logits& row, int64_t column) const {
  loops_.widen[row.dtype](row.data + column * size_of(row.dtype), 1, student_buffer_);
  return student_buffer_[0];
}

int64_t RowKernel::first_max(const Logits& row, const Softmax& softmax) const {
  const Block x = read(row, softmax.best_block(), true, student_buffer_);
  int64_t i = 0;
  while (i + 1 < x.n && floats(x)[i] != softmax.max()) ++i;
  return softmax.best_block() * kBlock + i;
}

}  // namespace distill
