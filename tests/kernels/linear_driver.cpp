// Multiplies by one packed matrix on another processor: `test_cpu_neon.py` cross-compiles it and runs it in an emulator.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "interface.hpp"

extern "C" int32_t specdec_runs(const char* isa);
extern "C" int32_t specdec_linear(const char* isa, const specdec::Matrix* matrix, const float* x, int64_t rows,
                                  float* y, int32_t threads);

static std::vector<char> read(const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    std::vector<char> bytes;
    for (int c; file != nullptr && (c = std::fgetc(file)) != EOF;) bytes.push_back(static_cast<char>(c));
    if (file != nullptr) std::fclose(file);
    return bytes;
}

int main(int argc, char** argv) {
    if (argc != 10) return 2;
    const std::vector<char> data = read(argv[6]), scales = read(argv[7]), x = read(argv[8]);
    const specdec::Matrix matrix{std::atoi(argv[2]), std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5]),
                                 data.data(), scales.data(), nullptr};
    const int64_t rows = static_cast<int64_t>(x.size() / sizeof(float)) / matrix.in;
    std::vector<float> y(static_cast<std::size_t>(rows * matrix.out));
    if (!specdec_runs(argv[1])) return 3;
    const int32_t status = specdec_linear(argv[1], &matrix, reinterpret_cast<const float*>(x.data()), rows, y.data(), 2);
    std::FILE* file = std::fopen(argv[9], "wb");
    std::fwrite(y.data(), sizeof(float), y.size(), file);
    std::fclose(file);
    return status;
}
