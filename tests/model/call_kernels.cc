// Calls the kernels as XLA would, for a processor on which no jax runs here: reads calls from the standard input, each as
// numbers of 64 bits (function, arguments, results, attributes; the attributes, 0 or 1; of each array its type, rank and
// dimensions) and the arguments' data, and writes the results' data to the standard output.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define FUNCTIONS(of) \
  of(s1jax_multiply), of(s1jax_attend), of(s1jax_write), of(s1jax_survey), of(s1jax_matmul), of(s1jax_attention), \
      of(s1jax_attention_gradients)
#define DECLARED(name) *name(XLA_FFI_CallFrame*)
extern "C" XLA_FFI_Error FUNCTIONS(DECLARED);
#define NAMED(name) name
XLA_FFI_Handler* const kFunctions[] = {FUNCTIONS(NAMED)};

struct XLA_FFI_Error {};

namespace {

int64_t number() {
  int64_t read;
  if (fread(&read, sizeof(read), 1, stdin) != 1) exit(feof(stdin) ? 0 : 1);
  return read;
}

struct Array {
  std::vector<int64_t> dimensions;
  std::vector<char> data;
  XLA_FFI_Buffer buffer{XLA_FFI_Buffer_STRUCT_SIZE};

  void read_shape() {
    buffer.dtype = static_cast<XLA_FFI_DataType>(number());
    const auto type = buffer.dtype;
    int64_t bits = type == XLA_FFI_DataType_S4 ? 4 : type == XLA_FFI_DataType_S8 ? 8 : type == XLA_FFI_DataType_BF16 ? 16 : 32;
    dimensions.resize(buffer.rank = number());
    for (int64_t& dimension : dimensions) bits *= dimension = number();
    data.resize(bits / 8);
    buffer.dims = dimensions.data();
    buffer.data = data.data();
  }
};

XLA_FFI_Error* fail(XLA_FFI_Error_Create_Args* args) {
  fprintf(stderr, "%s\n", args->message);
  exit(1);
}

XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = 2;
  return nullptr;
}

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  std::thread(args->task, args->data).detach();
  return nullptr;
}

}  // namespace

int main() {
  XLA_FFI_Api api{XLA_FFI_Api_STRUCT_SIZE};
  api.XLA_FFI_Error_Create = fail;
  api.XLA_FFI_ThreadPool_NumThreads = count_threads;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  while (true) {
    XLA_FFI_Handler* function = kFunctions[number()];
    const int64_t inputs = number(), outputs = number(), attributes = number();
    bool values[2];
    XLA_FFI_ByteSpan names[] = {{"transpose_a", 11}, {"transpose_b", 11}}, *named[] = {&names[0], &names[1]};
    XLA_FFI_Scalar scalars[] = {{XLA_FFI_DataType_PRED, &values[0]}, {XLA_FFI_DataType_PRED, &values[1]}};
    void* scalar[] = {&scalars[0], &scalars[1]};
    XLA_FFI_AttrType kinds[] = {XLA_FFI_AttrType_SCALAR, XLA_FFI_AttrType_SCALAR};
    for (int64_t i = 0; i < attributes; i++) values[i] = number();

    std::vector<Array> arrays(inputs + outputs);
    std::vector<void*> buffers;
    for (Array& array : arrays) array.read_shape(), buffers.push_back(&array.buffer);
    for (int64_t i = 0; i < inputs; i++)
      if (fread(arrays[i].data.data(), 1, arrays[i].data.size(), stdin) != arrays[i].data.size()) return 1;

    std::vector<XLA_FFI_ArgType> arguments(inputs, XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> results(outputs, XLA_FFI_RetType_BUFFER);
    XLA_FFI_CallFrame frame{XLA_FFI_CallFrame_STRUCT_SIZE};
    frame.api = &api;
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, inputs, arguments.data(), buffers.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, outputs, results.data(), buffers.data() + inputs};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, attributes, kinds, named, scalar};
    function(&frame);
    for (int64_t i = inputs; i < inputs + outputs; i++)
      fwrite(arrays[i].data.data(), 1, arrays[i].data.size(), stdout);
  }
}
