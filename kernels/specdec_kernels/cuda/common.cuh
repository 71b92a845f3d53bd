// What every source here needs. A source is a library of its own with one entry point, specdec_<name>.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#define SPECDEC_API extern "C" __attribute__((visibility("default")))

SPECDEC_API const char* specdec_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

// Whether the runtime that is linked in gets along with this machine's driver.
SPECDEC_API int specdec_ready() {
  int devices = 0;
  return cudaGetDeviceCount(&devices);
}
