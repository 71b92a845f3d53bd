#include "interface.hpp"

#if defined(__aarch64__)
#define SPECDEC_ISA neon
#define SPECDEC_NEON
#include "body.hpp"

namespace specdec {
static const Kernels table{"neon", neon::linear, neon::stack};
const Kernels* const kernels_neon = &table;
}  // namespace specdec
#else
namespace specdec {
const Kernels* const kernels_neon = nullptr;
}
#endif
