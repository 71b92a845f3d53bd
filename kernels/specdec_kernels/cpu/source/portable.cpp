#include "interface.hpp"

#if 1
#define SPECDEC_ISA portable
#define SPECDEC_PORTABLE
#include "body.hpp"

namespace specdec {
static const Kernels table{"portable", portable::linear, portable::stack};
const Kernels* const kernels_portable = &table;
}  // namespace specdec
#else
namespace specdec {
const Kernels* const kernels_portable = nullptr;
}
#endif
