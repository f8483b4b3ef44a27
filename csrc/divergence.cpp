// The operator `distill::divergence` on CPU: see distill/kernels/__init__.py for the formula. Only the stable ABI of
// LibTorch is used, so that one build serves every Python and torch >= 2.10.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "inputs.h"
#include "row.h"

namespace distill {
namespace {

using Scalars = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::string names(const std::vector<const Loops*>& all) {
  std::string joined;
  for (const Loops* loops : all) joined += (joined.empty() ? "" : ",") + std::string(loops->name);
  return joined;
}

std::string instruction_sets() { return names(available_loops()); }

// The best this processor can run, or what the environment names.
const Loops& chosen_loops() {
  static const std::vector<const Loops*> all = available_loops();
  const char* named = std::getenv("DISTILL_ISA");
  if (named == nullptr || *named == '\0') return *all.front();
  for (const Loops* loops : all) {
    if (std::string(named) == loops->name) return *loops;
  }
  STD_TORCH_CHECK(false, "DISTILL_ISA is ", named, ", this processor and build have ", names(all));
}

Kind kind_of(const std::string& name) {
  if (name == "forward_kl") return kForwardKl;
  if (name == "reverse_kl") return kReverseKl;
  if (name == "jsd") return kJsd;
  STD_TORCH_CHECK(name == "tvd", "kind must be forward_kl, reverse_kl, jsd or tvd, got ", name);
  return kTvd;
}

// Kept by each thread between calls: fresh memory costs page faults.
float* scratch(int64_t size) {
  constexpr int64_t alignment = 64 / sizeof(float);
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < size + alignment) memory.resize(static_cast<size_t>(size + alignment));
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

std::vector<RowResult> run(const Inputs& inputs, const Terms& terms) {
  const Loops& loops = chosen_loops();
  std::vector<RowResult> results(static_cast<size_t>(inputs.num_rows));
  const int64_t grain = 1 + 16384 / terms.vocab_size;
  torch::stable::parallel_for(0, inputs.num_rows, grain, [&](int64_t begin, int64_t end) {
    RowKernel kernel(loops, terms, scratch(RowKernel::scratch_size(terms.vocab_size)));
    for (int64_t i = begin; i < end; ++i) {
      if (inputs.counts(i)) results[static_cast<size_t>(i)] = kernel.run(inputs.row(i));
      inputs.zero_grad(i, inputs.counts(i) ? terms.vocab_size : 0);
    }
  });
  return results;
}

template <class T>
Tensor scalar(const Tensor& like, ScalarType type, double value) {
  Tensor tensor = torch::stable::new_empty(like, {}, type);
  *tensor.mutable_data_ptr<T>() = static_cast<T>(value);
  return tensor;
}

// Adds in the order of the rows: the same to the bit whatever the number of threads.
Scalars sums(const std::vector<RowResult>& rows, const Inputs& inputs, const Tensor& like) {
  RowResult total;
  int64_t num_correct = 0, num_rows = 0;
  for (int64_t i = 0; i < inputs.num_rows; ++i) {
    const RowResult& row = rows[static_cast<size_t>(i)];
    total.loss += row.loss;
    total.soft += row.soft;
    total.soft_ce += row.soft_ce;
    total.hard += row.hard;
    num_correct += row.is_correct;
    num_rows += inputs.counts(i);
  }
  const auto real = [&](double value) { return scalar<float>(like, ScalarType::Float, value); };
  const auto count = [&](int64_t value) {
    return scalar<int64_t>(like, ScalarType::Long, static_cast<double>(value));
  };
  return {real(total.loss), real(total.soft), real(total.soft_ce), real(total.hard), count(num_correct),
          count(num_rows)};
}

Scalars divergence(Tensor student, std::optional<Tensor> teacher, std::optional<Tensor> ids,
                   std::optional<Tensor> probs, std::optional<Tensor> tail, std::optional<Tensor> labels,
                   std::optional<Tensor> weights, std::optional<Tensor> grad, std::string kind, double beta,
                   double soft_factor, double hard_weight, double teacher_temperature, double student_temperature,
                   int64_t vocab_size) {
  const Terms terms{kind_of(kind),       beta,      soft_factor, hard_weight, teacher_temperature,
                    student_temperature, vocab_size};
  STD_TORCH_CHECK(vocab_size > 0 && student_temperature > 0, "vocab_size and student_temperature must be above 0");
  STD_TORCH_CHECK(terms.kind != kReverseKl || teacher_temperature > 0,
                  "the reverse KL from an arg-max is infinite: teacher_temperature must be above 0");
  const Inputs inputs(terms, student, teacher, ids, probs, tail, labels, weights, grad);
  return sums(run(inputs, terms), inputs, student);
}

}  // namespace
}  // namespace distill

STABLE_TORCH_LIBRARY(distill, m) {
  m.def(
      "divergence(Tensor student, Tensor? teacher, Tensor? ids, Tensor? probs, Tensor? tail, Tensor? labels, "
      "Tensor? weights, Tensor(a!)? grad, str kind, float beta, float soft_factor, float hard_weight, "
      "float teacher_temperature, float student_temperature, int vocab_size) "
      "-> (Tensor loss, Tensor soft, Tensor soft_ce, Tensor hard, Tensor num_correct, Tensor num_rows)");
  m.def("instruction_sets() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(distill, CPU, m) { m.impl("divergence", TORCH_BOX(&distill::divergence)); }

STABLE_TORCH_LIBRARY_IMPL(distill, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&distill::instruction_sets));
}
