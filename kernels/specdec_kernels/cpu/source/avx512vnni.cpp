#include "interface.hpp"

#if defined(__x86_64__)
#define SPECDEC_ISA avx512vnni
#define SPECDEC_AVX512
#define SPECDEC_VNNI
#include "body.hpp"

namespace specdec {
static const Kernels table{"avx512vnni", avx512vnni::linear, avx512vnni::stack};
const Kernels* const kernels_avx512vnni = &table;
}  // namespace specdec
#else
namespace specdec {
const Kernels* const kernels_avx512vnni = nullptr;
}
#endif
