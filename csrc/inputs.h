// The tensors of a call, checked, as rows of plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>

#include "row.h"

namespace distill {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kIgnoredLabel = -100;

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return kFloat;
  if (type == ScalarType::BFloat16) return kBfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return kHalf;
}

// A tensor [N, >= vocab_size]; rows may be strided, columns are contiguous.
struct Matrix {
  Matrix(const char* name, const Tensor& tensor, int64_t num_rows, int64_t vocab_size)
      : data(static_cast<const char*>(tensor.const_data_ptr())), dtype(dtype_of(name, tensor)) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == num_rows && tensor.size(1) >= vocab_size, name,
                    " must be [", num_rows, ", >= ", vocab_size, "]");
    STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, name, " must have contiguous columns");
    stride = tensor.stride(0) * size_of(dtype);
    width = tensor.size(1) * size_of(dtype);
  }
  Logits row(int64_t i) const { return {data + i * stride, dtype}; }

  const char* data;
  Dtype dtype;
  int64_t stride, width;  // in bytes
};

// `size` numbers for each row; null without a tensor. Keeps what it points to alive.
template <class T>
class Column {
 public:
  Column(const char* name, const std::optional<Tensor>& given, int64_t num_rows, int64_t size = 1) : size_(size) {
    if (!given) return;
    STD_TORCH_CHECK(given->numel() == num_rows * size, name, " must have ", num_rows * size, " elements, got ",
                    given->numel());
    tensor_ = torch::stable::contiguous(*given);
    data_ = tensor_->template const_data_ptr<T>();
  }
  const T* row(int64_t i) const { return data_ == nullptr ? nullptr : data_ + i * size_; }
  T at(int64_t i, T otherwise) const { return data_ == nullptr ? otherwise : data_[i]; }

 private:
  std::optional<Tensor> tensor_;
  const T* data_ = nullptr;
  int64_t size_;
};

class Inputs {
 public:
  Inputs(const Terms& terms, const Tensor& student, const std::optional<Tensor>& teacher,
         const std::optional<Tensor>& ids, const std::optional<Tensor>& probs, const std::optional<Tensor>& tail,
         const std::optional<Tensor>& labels, const std::optional<Tensor>& weights, std::optional<Tensor>& grad)
      : num_rows(student.size(0)),
        num_kept_(ids && ids->dim() == 2 ? ids->size(1) : 0),
        student_("student", student, num_rows, terms.vocab_size),
        ids_("ids", ids, num_rows, num_kept_),
        probs_("probs", probs, num_rows, num_kept_),
        tail_("tail", tail, num_rows),
        labels_("labels", labels, num_rows),
        weights_("weights", weights, num_rows) {
    if (teacher) teacher_.emplace("teacher", *teacher, num_rows, terms.vocab_size);
    STD_TORCH_CHECK(ids.has_value() == probs.has_value(), "ids and probs come together");
    if (grad) set_grad(*grad, student, terms.vocab_size);
    check(terms.vocab_size);
  }

  bool counts(int64_t i) const { return labels_.at(i, 0) != kIgnoredLabel; }

  Row row(int64_t i) const {
    Row row;
    row.student = student_.row(i);
    if (teacher_) row.teacher = teacher_->row(i);
    row.sparse = {ids_.row(i), probs_.row(i), num_kept_, tail_.at(i, 0)};
    row.label = labels_.at(i, -1);
    row.weight = weights_.at(i, 1);
    row.grad = grad_row(i);
    return row;
  }

  // Zeros in the columns of a gradient's row from `start` on.
  void zero_grad(int64_t i, int64_t start) const {
    if (grad_ == nullptr) return;
    const int64_t skipped = start * size_of(student_.dtype);
    std::memset(grad_row(i) + skipped, 0, static_cast<size_t>(grad_width_ - skipped));
  }

  const int64_t num_rows;

 private:
  void set_grad(Tensor& grad, const Tensor& student, int64_t vocab_size) {
    const Matrix rows("grad", grad, num_rows, vocab_size);
    STD_TORCH_CHECK(rows.dtype == student_.dtype && grad.size(1) == student.size(1),
                    "grad must have the dtype and shape of student");
    STD_TORCH_CHECK(num_rows < 2 || rows.stride >= rows.width, "the rows of grad must not overlap");
    grad_ = static_cast<char*>(grad.mutable_data_ptr());
    grad_stride_ = rows.stride;
    grad_width_ = rows.width;
  }
  char* grad_row(int64_t i) const { return grad_ == nullptr ? nullptr : grad_ + i * grad_stride_; }

  void check(int64_t vocab_size) const {
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t label = labels_.at(i, 0);
      STD_TORCH_CHECK(label == kIgnoredLabel || (label >= 0 && label < vocab_size), "label ", label, " in row ", i,
                      " is neither ", kIgnoredLabel, " nor in 0..", vocab_size - 1);
      for (int64_t k = 0; k < num_kept_; ++k) {
        const int64_t id = ids_.row(i)[k];
        STD_TORCH_CHECK(probs_.row(i)[k] == 0 || (id >= 0 && id < vocab_size), "target id ", id, " in row ", i,
                        " is not in 0..", vocab_size - 1);
      }
    }
  }

  const int64_t num_kept_;
  const Matrix student_;
  std::optional<Matrix> teacher_;
  const Column<int64_t> ids_;
  const Column<float> probs_, tail_;
  const Column<int64_t> labels_;
  const Column<float> weights_;
  char* grad_ = nullptr;
  int64_t grad_stride_ = 0, grad_width_ = 0;
};

}  // namespace distill
