// All kernels, compiled once per instruction set: the including file defines SPECDEC_ISA and one of SPECDEC_AVX2,
// SPECDEC_AVX512 (with SPECDEC_VNNI or without), SPECDEC_NEON or none.
//
// Row invariance: an output is computed by one thread, from one row, in an order of operations that depends on the
// matrix (or on the number of slots the node sees) alone. Blocks of rows share loaded weights and nothing else.
#pragma once
#include "attention.hpp"
#include "product.hpp"
#include "stack.hpp"
