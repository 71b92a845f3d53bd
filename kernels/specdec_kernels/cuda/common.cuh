// What every source here needs. A source holds device code alone, compiled to a cubin by nvcc or by NVRTC; its kernels
// are extern "C", so both compilers give them the names that cuda/library.py asks for.
#pragma once

#ifdef __CUDACC_RTC__
// NVRTC has none of the host's headers.
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#define INT32_MAX 0x7FFFFFFF
#define UINT32_MAX 0xFFFFFFFFu
#define INFINITY __int_as_float(0x7F800000)
#else
#include <cmath>
#include <cstdint>
#endif
