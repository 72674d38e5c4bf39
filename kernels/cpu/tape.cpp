// A tape: the ops of a pipeline stage, recorded once by infer/engine/tape.py and run by one call from Python.
//
// It calls every op through torch's dispatcher, as Python would, but without the interpreter between two ops: some ten
// microseconds each, which at few rows are as much as the ops themselves.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

namespace infer {
namespace {

class Tape : public torch::CustomClassHolder {
 public:
  // Slots [0, num_inputs) hold what run is given.
  explicit Tape(int64_t num_inputs) : num_inputs_(num_inputs), num_slots_(num_inputs) {
    TORCH_CHECK_VALUE(num_inputs >= 0, "Tape: num_inputs is ", num_inputs, ", must not be negative");
  }

  // Adds a call of an op. Argument i is the slot slots[i], or arguments[i] where slots[i] is -1, or an empty list where
  // it is -2; arguments beyond them have the defaults of the schema. Returns the slot of its first result; the others
  // follow.
  int64_t add(const std::string& name, const std::string& overload, const c10::List<c10::IValue>& arguments,
              const std::vector<int64_t>& slots) {
    Call call{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, num_slots_};
    const auto& schema = call.op.schema();
    TORCH_CHECK_VALUE(arguments.size() == slots.size() && slots.size() <= schema.arguments().size(), "Tape: ", name,
                      " takes ", schema.arguments().size(), " arguments, got ", arguments.size(), " and ",
                      slots.size(), " slots");
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const auto& argument = schema.arguments()[i];
      if (i < slots.size() && slots[i] >= 0) {
        TORCH_CHECK_VALUE(slots[i] < num_slots_, "Tape: ", name, " reads slot ", slots[i], " of ", num_slots_);
        call.reads.push_back({i, static_cast<size_t>(slots[i]), false});
        call.arguments.emplace_back();
        continue;
      }
      TORCH_CHECK_VALUE(i < slots.size() || argument.default_value(), "Tape: ", name, " needs its argument ",
                        argument.name());
      if (i >= slots.size()) {
        call.arguments.push_back(*argument.default_value());
      } else {
        call.arguments.push_back(slots[i] == -2 ? empty_list(argument.type()) : as(argument.type(), arguments.get(i)));
      }
    }
    num_slots_ += static_cast<int64_t>(schema.returns().size());
    calls_.push_back(std::move(call));
    return calls_.back().first_result;
  }

  // Ends the recording: run gives these slots.
  void finish(const std::vector<int64_t>& results) {
    std::vector<bool> needed(num_slots_, false);
    for (const int64_t slot : results) {
      TORCH_CHECK_VALUE(0 <= slot && slot < num_slots_, "Tape: no slot ", slot, " of ", num_slots_);
      needed[slot] = true;
    }
    // A slot's last reader takes its value, so that memory is given back as early as it is by the interpreter.
    for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
      for (auto read = call->reads.rbegin(); read != call->reads.rend(); ++read) {
        read->is_last = !needed[read->slot];
        needed[read->slot] = true;
      }
    }
    results_ = results;
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) const {
    TORCH_CHECK_VALUE(static_cast<int64_t>(inputs.size()) == num_inputs_, "Tape: ", inputs.size(), " inputs, takes ",
                      num_inputs_);
    std::vector<c10::IValue> slots(num_slots_);
    for (size_t i = 0; i < inputs.size(); ++i) slots[i] = std::move(inputs[i]);
    torch::jit::Stack stack;
    for (const Call& call : calls_) {
      stack = call.arguments;
      for (const Read& read : call.reads) {
        stack[read.argument] = read.is_last ? std::move(slots[read.slot]) : slots[read.slot];
      }
      call.op.callBoxed(&stack);
      for (size_t i = 0; i < stack.size(); ++i) slots[call.first_result + i] = std::move(stack[i]);
    }
    std::vector<at::Tensor> results;
    for (const int64_t slot : results_) results.push_back(slots[slot].toTensor());
    return results;
  }

 private:
  struct Read {
    size_t argument, slot;
    bool is_last;  // nothing reads the slot after this
  };

  struct Call {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;  // None where a slot is read
    std::vector<Read> reads;
    int64_t first_result;  // slot
  };

  // Where Python gives a number, the schema may want a float, or a tensor that does not decide the result's dtype.
  static c10::IValue as(const c10::TypePtr& type, const c10::IValue& value) {
    if (value.isInt() && type->kind() == c10::TypeKind::FloatType) return static_cast<double>(value.toInt());
    if (value.isScalar() && type->kind() == c10::TypeKind::TensorType) {
      at::Tensor number = at::scalar_to_tensor(value.toScalar());
      number.unsafeGetTensorImpl()->set_wrapped_number(true);
      return number;
    }
    return value;
  }

  static c10::IValue empty_list(const c10::TypePtr& type) {
    const auto list = type->cast<c10::ListType>();
    TORCH_CHECK_VALUE(list, "Tape: a list stands where the schema has ", type->str());
    return c10::impl::GenericList(list->getElementType());
  }

  const int64_t num_inputs_;
  int64_t num_slots_;
  std::vector<Call> calls_;
  std::vector<int64_t> results_;
};

}  // namespace
}  // namespace infer

TORCH_LIBRARY_FRAGMENT(infer, m) {
  m.class_<infer::Tape>("Tape")
      .def(torch::init<int64_t>())
      .def("add", &infer::Tape::add)
      .def("finish", &infer::Tape::finish)
      .def("run", &infer::Tape::run);
}
