// The C entry points: which kernels this processor runs, and how a product is divided among threads.
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"

using namespace attar;

namespace {

constexpr int64_t PANEL_BYTES = 640 << 10;  // unpacked weights of a thread: they stay in its L2 cache
constexpr int64_t BLOCK_BYTES = 16 << 20;   // activation codes of a call: they stay in the last cache
constexpr int64_t FEWEST_ROWS = 128;        // a thread's rows, below which unpacking the weights would show

// Memory that a thread keeps between calls: fresh pages would cost a few percent of each one.
struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
    void* reserve(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = aligned_alloc(4096, size);
            if (!data) size = 0;
        }
        return data;
    }
};

thread_local Buffer shared_buffer, own_buffer;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

const Kernels* kernels_at(int level) {
#if defined(__x86_64__)
    static const Kernels* const found[] = {
        &scalar_kernels,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? &avx2_kernels : nullptr,
        __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? &avxvnni_kernels : nullptr,
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("bmi2")
            ? &avx512_kernels
            : nullptr,
    };
#else
    static const Kernels* const found[] = {&scalar_kernels};
#endif
    return level >= 0 && level < int(sizeof found / sizeof *found) ? found[level] : nullptr;
}

// One block of rows: [first, first + rows) of x, whose codes, scales and offsets are in the shared buffer.
struct Block {
    int64_t first, rows, padded;
    int8_t* codes;
    float* scale;
    int32_t* offset;
};

// A panel of outputs [n0, n1) against the rows [r0, r1) of the block; the panel lies unpacked in `panel`.
void multiply_panel(const Kernels& kernels, const Linear& call, const Block& block, const uint8_t* panel, int64_t n0,
                    int64_t n1, int64_t r0, int64_t r1) {
    const int bytes = call.y_dtype == FLOAT32 ? 4 : 2;
    for (int64_t r = r0; r < r1; r += kernels.max_rows) {
        const int rows = int(least(kernels.max_rows, r1 - r));
        for (int64_t n = n0; n < n1; n += kernels.strip) {
            Tile tile;
            tile.x = block.codes + r * block.padded;
            tile.strip = panel + (n - n0) * block.padded;
            tile.depth = (call.weight.k + 3) / 4;
            tile.offset = block.offset + r;
            tile.row_scale = block.scale + r;
            tile.scale = call.weight.scale + n;
            tile.bias = call.bias ? call.bias + n : nullptr;
            tile.y = static_cast<char*>(call.y) + ((block.first + r) * call.weight.n + n) * bytes;
            tile.y_stride = call.weight.n;
            tile.y_dtype = call.y_dtype;
            tile.cols = int(least(kernels.strip, n1 - n));
            kernels.tile(rows, tile);
        }
    }
}

}  // namespace

extern "C" {

// Name of the kernels at `level` (0 is the slowest), or null where the processor or the build lacks them.
const char* attar_kernels(int level) {
    const Kernels* kernels = kernels_at(level);
    return kernels ? kernels->name : nullptr;
}

int attar_has_threads() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// Returns 0, or 1 when there is not enough memory.
int attar_linear(const Linear* pointer, int level) {
    const Linear& call = *pointer;
    const Kernels& kernels = *kernels_at(level);
    const int64_t n = call.weight.n, padded = round_up(call.weight.k, 64);
    const int64_t most_rows = least(call.m, most(FEWEST_ROWS, BLOCK_BYTES / padded));
    const int64_t blocks = (call.m + most_rows - 1) / most_rows;
    const int64_t block_rows = round_up((call.m + blocks - 1) / blocks, kernels.max_rows);

    char* memory = static_cast<char*>(shared_buffer.reserve(block_rows * (padded + 8)));
    if (!memory) return 1;
    const int64_t strips = (n + kernels.strip - 1) / kernels.strip;
    const int64_t fitting = most(1, PANEL_BYTES / (kernels.strip * padded));
    const int64_t panel_strips = most(1, least(fitting, strips / most(1, 2 * call.threads)));
    const int64_t panels = (strips + panel_strips - 1) / panel_strips, panel = panel_strips * kernels.strip;
    int failed = 0;

    for (int64_t first = 0; first < call.m; first += block_rows) {
        Block block;
        block.first = first, block.rows = least(block_rows, call.m - first);
        block.padded = padded;
        block.codes = reinterpret_cast<int8_t*>(memory);
        block.scale = reinterpret_cast<float*>(memory + block_rows * padded);
        block.offset = reinterpret_cast<int32_t*>(block.scale + block_rows);
        const int64_t parts =
            panels >= call.threads ? 1 : most(1, least(call.threads / panels, block.rows / FEWEST_ROWS));
        const int64_t part_rows = round_up((block.rows + parts - 1) / parts, kernels.max_rows);

#pragma omp parallel num_threads(call.threads)
        {
            const int64_t quantizing = padded * (2 * sizeof(float) + kernels.max_rows);
            uint8_t* own = static_cast<uint8_t*>(own_buffer.reserve(most(quantizing, panel * padded)));
            if (!own) {
#pragma omp atomic write
                failed = 1;
            }
#pragma omp for schedule(static)
            for (int64_t r = 0; r < block.rows; r += kernels.max_rows)
                if (own)
                    kernels.quantize(call, first + r, least(kernels.max_rows, block.rows - r), padded, own,
                                     block.codes + r * padded, block.scale + r, block.offset + r);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < panels * parts; ++task) {
                if (!own) continue;
                const int64_t n0 = task / parts * panel, n1 = least(n, n0 + panel);
                const int64_t r0 = task % parts * part_rows, r1 = least(block.rows, r0 + part_rows);
                for (int64_t s = n0; s < n1; s += kernels.strip)
                    kernels.unpack(call.weight, s, padded, own + (s - n0) * padded);
                multiply_panel(kernels, call, block, own, n0, n1, r0, r1);
            }
        }
    }
    return failed;
}

// Rows [first, first + rows) of the weight -> out (rows, k) in `dtype`.
int attar_dequantize(const Weight* weight, int64_t first, int64_t rows, void* out, int32_t dtype, int threads,
                     int level) {
    const Kernels& kernels = *kernels_at(level);
    const int64_t row_bytes = weight->k * (dtype == FLOAT32 ? 4 : 2);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        uint8_t* scratch = static_cast<uint8_t*>(own_buffer.reserve(round_up(weight->k, 64) + 64));
        if (scratch) {
            kernels.dequantize(*weight, first + r, scratch, static_cast<char*>(out) + r * row_bytes, dtype);
        } else {
#pragma omp atomic write
            failed = 1;
        }
    }
    return failed;
}
}
