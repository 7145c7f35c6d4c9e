// Runs the loop of a file with every instruction set that the processor has. For machines without Python, as under
// qemu-user: loop_driver FILE. tests/kernels/test_aarch64.py writes the file and reads what is printed: for each set its
// name in a line, and then the estimates as float32, of one thread and of three.
#include <cstdio>
#include <vector>

#include "reverse_loop.cpp"

namespace {

FILE* file;
std::vector<void*> kept;

template <class T> T number() {
  T value;
  if (fread(&value, sizeof value, 1, file) != 1) abort();
  return value;
}
template <class T> T* array() {
  const size_t bytes = number<uint64_t>();
  void* memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (fread(memory, 1, bytes, file) != bytes) abort();
  kept.push_back(memory);
  return static_cast<T*>(memory);
}
Layer layer() {
  Layer l{};
  if (!number<int32_t>()) return l;
  l.weights = array<char>();
  l.bias = array<float>();
  l.scale = array<float>();
  l.sums = array<int32_t>();
  l.kind = number<int32_t>();
  l.in = number<int32_t>();
  l.out = number<int32_t>();
  return l;
}

}  // namespace

int main(int, char** arguments) {
  file = fopen(arguments[1], "rb");
  if (!file) return 1;
  Loop loop{};
  for (Layer* l : {&loop.condition, &loop.input, &loop.hidden2, &loop.hidden3, &loop.carry, &loop.output}) *l = layer();
  loop.slope = number<float>();
  loop.feature = number<int32_t>();
  Call call{};
  call.x = array<float>();
  call.coefficients = array<float>();
  call.bias = array<float>();
  for (int32_t* n : {&call.images, &call.samples, &call.noises, &call.steps}) *n = number<int32_t>();
  std::vector<float> out(size_t(call.images) * call.samples * loop.output.out);
  call.out = out.data();
  for (int set = 0; marnet_loop_set(set); set++)
    if (marnet_loop_has(set)) {
      printf("%s\n", marnet_loop_set(set));
      for (int threads : {1, 3}) {
        if (marnet_loop_run(&loop, &call, set, threads) != threads) return 2;
        fwrite(out.data(), sizeof(float), out.size(), stdout);
      }
    }
  marnet_loop_end();
  for (void* memory : kept) free(memory);
  return 0;
}
