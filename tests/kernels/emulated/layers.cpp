// `cuda/layers.cu` on the emulated GPU, as tests/kernels/test_layers_emulated.py calls it.
#include "layers.cu"

#include "gpu.hpp"

extern "C" const char* run_layers(int half, int size, const void* arguments, int blocks, int64_t shared,
                                  uint64_t seed) {
  static thread_local std::string said;
  try {
    Arguments a;
    std::memcpy(&a, arguments, sizeof(a));
    const auto kernel = half ? (size == 64 ? layers_float16_64 : layers_float16_128)
                             : (size == 64 ? layers_bfloat16_64 : layers_bfloat16_128);
    gpu::run([&] { kernel(a); }, blocks, kThreads, shared, seed, uint64_t{1} << 27);
    return nullptr;
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}
