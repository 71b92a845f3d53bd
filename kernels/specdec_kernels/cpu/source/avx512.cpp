#include "interface.hpp"

#if defined(__x86_64__)
#define SPECDEC_ISA avx512
#define SPECDEC_AVX512
#include "body.hpp"

namespace specdec {
static const Kernels table{"avx512", avx512::linear, avx512::stack};
const Kernels* const kernels_avx512 = &table;
}  // namespace specdec
#else
namespace specdec {
const Kernels* const kernels_avx512 = nullptr;
}
#endif
