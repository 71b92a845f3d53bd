// What Python calls.
#include "interface.hpp"

#include <cstring>

namespace {

const specdec::Kernels* find(const char* name) {
    const specdec::Kernels* all[] = {specdec::kernels_avx512vnni, specdec::kernels_avx512, specdec::kernels_avx2,
                                     specdec::kernels_neon, specdec::kernels_portable};
    for (const specdec::Kernels* kernels : all)
        if (kernels != nullptr && std::strcmp(kernels->name, name) == 0) return kernels;
    return nullptr;
}

bool runs(const char* name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (std::strcmp(name, "avx2") == 0) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (std::strcmp(name, "avx512") == 0) return avx512;
    if (std::strcmp(name, "avx512vnni") == 0) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
    return find(name) != nullptr;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Whether this build and this processor can run the instruction set.
int32_t specdec_runs(const char* isa) { return find(isa) != nullptr && runs(isa) ? 1 : 0; }

int64_t specdec_size_of(int32_t which) {
    switch (which) {
        case 0: return sizeof(specdec::Matrix);
        case 1: return sizeof(specdec::Layer);
        case 2: return sizeof(specdec::Stack);
        default: return sizeof(specdec::Call);
    }
}

int32_t specdec_linear(const char* isa, const specdec::Matrix* matrix, const float* x, int64_t rows, float* y,
                       int32_t threads) {
    return find(isa)->linear(*matrix, x, rows, y, threads);
}

int32_t specdec_stack(const char* isa, const specdec::Stack* stack, const specdec::Call* call) {
    return find(isa)->stack(*stack, *call);
}

}  // extern "C"
#pragma GCC visibility pop
