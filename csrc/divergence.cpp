// Divergence of a student from a teacher and from labels, with its gradient, on CPU: see distill/kernels/__init__.py
// for the formula. Only the stable ABI of LibTorch is used, so that one build serves every Python and torch >= 2.10.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "row.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kIgnoredLabel = -100;

struct Terms {
  double kl_weight;            // the T^2 factor is already in it
  double hard_weight;
  double teacher_temperature;  // 0: the arg-max
  double student_temperature;
};

struct RowResult {
  double kl = 0, soft_ce = 0, hard = 0;
  bool counted = false, correct = false;
};

// Rows of a [N, V] tensor, read as float whatever the dtype; columns are contiguous, rows may be strided.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        stride_(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        is_float_(tensor.scalar_type() == ScalarType::Float) {}

  const float* read(int64_t index, float* scratch, int64_t n) const {
    const char* start = data_ + index * stride_;
    if (is_float_) return reinterpret_cast<const float*>(start);
    row::widen(reinterpret_cast<const uint16_t*>(start), scratch, n);
    return scratch;
  }

 private:
  const char* data_;
  int64_t stride_;
  bool is_float_;
};

// One row at a time; the scratch rows stay in the cache of the core.
class RowKernel {
 public:
  RowKernel(const Terms& terms, int64_t n)
      : terms_(terms), n_(n), scratch_(static_cast<size_t>(5 * n)), e_s_(part(3)), e_t_(part(4)) {}

  float* student_scratch() { return part(0); }
  float* teacher_scratch() { return part(1); }
  float* grad_scratch() { return part(2); }

  // `teacher` may be null, `label` negative; the gradient is written when `grad` is not null.
  RowResult run(const float* student, const float* teacher, int64_t label, float* grad) {
    RowResult result;
    result.counted = true;
    const bool has_soft = teacher != nullptr && terms_.teacher_temperature > 0;
    const bool has_best = teacher != nullptr && !has_soft;
    const float max = row::maximum(student, n_);
    double sum = 0;  // of the student's exponentials, which stay in e_s_
    if (has_soft) {
      sum = soft(student, max, teacher, grad, &result);
    } else if (grad != nullptr) {
      std::memset(grad, 0, static_cast<size_t>(n_) * sizeof(float));
    }
    if (label < 0 && !has_best) return result;
    if (!has_soft || terms_.student_temperature != 1.0) sum = row::exponentials(student, max, 1.0f, e_s_, n_);
    if (has_best) {
      const int64_t best = row::first_index(teacher, row::maximum(teacher, n_), n_);
      result.kl = result.soft_ce = one_hot(student, max, sum, best, terms_.kl_weight, grad);
    }
    if (label >= 0) {
      result.hard = one_hot(student, max, sum, label, terms_.hard_weight, grad);
      result.correct = student[label] == max && row::first_index(student, max, label + 1) == label;
    }
    return result;
  }

 private:
  float* part(int64_t index) { return scratch_.data() + index * n_; }

  // KL and soft cross-entropy with their gradient. Returns the sum of the student's exponentials.
  double soft(const float* student, float s_max, const float* teacher, float* grad, RowResult* result) {
    const float s_scale = static_cast<float>(1.0 / terms_.student_temperature);
    const float t_scale = static_cast<float>(1.0 / terms_.teacher_temperature);
    const float t_max = row::maximum(teacher, n_);
    const double s_sum = row::exponentials(student, s_max, s_scale, e_s_, n_);
    const double t_sum = row::exponentials(teacher, t_max, t_scale, e_t_, n_);
    const row::Moments moments = row::moments(student, s_max, s_scale, teacher, t_max, t_scale, e_t_, n_);
    result->kl = moments.excess / t_sum - std::log(t_sum) + std::log(s_sum);
    result->soft_ce = std::log(s_sum) - moments.student / t_sum;
    if (grad != nullptr) {
      const double weight = terms_.kl_weight * s_scale;
      row::difference(static_cast<float>(weight / s_sum), e_s_, static_cast<float>(weight / t_sum), e_t_, grad, n_);
    }
    return s_sum;
  }

  // Cross-entropy with class `target`, student at temperature 1; adds weight * (p - one-hot) to the gradient.
  double one_hot(const float* student, float max, double sum, int64_t target, double weight, float* grad) {
    if (grad != nullptr && weight != 0) {
      row::add(static_cast<float>(weight / sum), e_s_, grad, n_);
      grad[target] -= static_cast<float>(weight);
    }
    return std::log(sum) - (static_cast<double>(student[target]) - max);
  }

  Terms terms_;
  int64_t n_;
  std::vector<float> scratch_;
  float *e_s_, *e_t_;
};

void check_labels(const int64_t* labels, int64_t num_rows, int64_t vocab_size) {
  for (int64_t i = 0; i < num_rows; ++i) {
    STD_TORCH_CHECK(labels[i] == kIgnoredLabel || (labels[i] >= 0 && labels[i] < vocab_size), "label ", labels[i],
                    " in row ", i, " is neither ", kIgnoredLabel, " nor in 0..", vocab_size - 1);
  }
}

Tensor check_logits(const Tensor& logits, int64_t num_rows, int64_t vocab_size) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "logits must be float32 or bfloat16");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == num_rows && logits.size(1) >= vocab_size,
                  "logits must be [", num_rows, ", >= ", vocab_size, "]");
  return logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

// Adds in the order of the rows: the same to the bit whatever the number of threads.
void write_sums(const std::vector<RowResult>& rows, const Terms& terms, Tensor loss, Tensor sums, Tensor counts) {
  double kl = 0, soft_ce = 0, hard = 0;
  int64_t num_correct = 0, num_rows = 0;
  for (const RowResult& r : rows) {
    kl += r.kl;
    soft_ce += r.soft_ce;
    hard += r.hard;
    num_correct += r.correct;
    num_rows += r.counted;
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(
      (terms.kl_weight != 0 ? terms.kl_weight * kl : 0) + (terms.hard_weight != 0 ? terms.hard_weight * hard : 0));
  float* out = sums.mutable_data_ptr<float>();
  out[0] = static_cast<float>(kl);
  out[1] = static_cast<float>(soft_ce);
  out[2] = static_cast<float>(hard);
  counts.mutable_data_ptr<int64_t>()[0] = num_correct;
  counts.mutable_data_ptr<int64_t>()[1] = num_rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence(Tensor student, std::optional<Tensor> teacher,
                                                      std::optional<Tensor> labels, double kl_weight,
                                                      double hard_weight, double teacher_temperature,
                                                      double student_temperature, int64_t vocab_size,
                                                      bool want_grad) {
  const Terms terms{kl_weight, hard_weight, teacher_temperature, student_temperature};
  const int64_t num_rows = student.size(0), width = student.size(1);
  student = check_logits(student, num_rows, vocab_size);
  if (teacher) teacher = check_logits(*teacher, num_rows, vocab_size);
  if (labels) labels = torch::stable::contiguous(*labels);
  const int64_t* label = labels ? labels->const_data_ptr<int64_t>() : nullptr;
  if (label != nullptr) check_labels(label, num_rows, vocab_size);

  Tensor grad = torch::stable::new_empty(student, {want_grad ? num_rows : 0, width});
  const Rows student_rows(student), teacher_rows(teacher ? *teacher : student);
  const bool grad_is_float = student.scalar_type() == ScalarType::Float;
  const size_t size = student.element_size();
  char* grad_data = want_grad ? static_cast<char*>(grad.mutable_data_ptr()) : nullptr;
  std::vector<RowResult> results(static_cast<size_t>(num_rows));

  torch::stable::parallel_for(0, num_rows, 1 + 16384 / vocab_size, [&](int64_t begin, int64_t end) {
    RowKernel kernel(terms, vocab_size);
    for (int64_t i = begin; i < end; ++i) {
      char* out = want_grad ? grad_data + static_cast<size_t>(i * width) * size : nullptr;
      if (label != nullptr && label[i] == kIgnoredLabel) {
        if (want_grad) std::memset(out, 0, static_cast<size_t>(width) * size);
        continue;
      }
      float* grad_row = grad_is_float ? reinterpret_cast<float*>(out) : kernel.grad_scratch();
      const float* s = student_rows.read(i, kernel.student_scratch(), vocab_size);
      const float* t = teacher ? teacher_rows.read(i, kernel.teacher_scratch(), vocab_size) : nullptr;
      results[static_cast<size_t>(i)] = kernel.run(s, t, label ? label[i] : -1, want_grad ? grad_row : nullptr);
      if (!want_grad) continue;
      if (!grad_is_float) row::narrow(grad_row, reinterpret_cast<uint16_t*>(out), vocab_size);
      std::memset(out + static_cast<size_t>(vocab_size) * size, 0, static_cast<size_t>(width - vocab_size) * size);
    }
  });

  Tensor loss = torch::stable::new_empty(student, {}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(student, {3}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(student, {2}, ScalarType::Long);
  write_sums(results, terms, loss, sums, counts);
  return {loss, sums, counts, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY(distill, m) {
  m.def(
      "divergence(Tensor student, Tensor? teacher, Tensor? labels, float kl_weight, float hard_weight, "
      "float teacher_temperature, float student_temperature, int vocab_size, bool want_grad) "
      "-> (Tensor loss, Tensor sums, Tensor counts, Tensor grad)");
}

STABLE_TORCH_LIBRARY_IMPL(distill, CPU, m) { m.impl("divergence", TORCH_BOX(&divergence)); }
