#include "interface.hpp"

#if defined(__x86_64__)
#define SPECDEC_ISA avx2
#define SPECDEC_AVX2
#include "body.hpp"

namespace specdec {
static const Kernels table{"avx2", avx2::linear, avx2::stack};
const Kernels* const kernels_avx2 = &table;
}  // namespace specdec
#else
namespace specdec {
const Kernels* const kernels_avx2 = nullptr;
}
#endif
