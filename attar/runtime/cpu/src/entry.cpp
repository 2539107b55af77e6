// The C entry points: which kernels this processor runs, and how a product is divided among threads.
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "memory.h"
#include "pieces.h"
#include "vectors.h"

namespace attar {

#if defined(__x86_64__) && defined(__linux__)
// Whether there are matrix registers, which the system gives to a process that asks for them, beside AVX-512.
bool has_matrices() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned bfloat16 = 1u << 22, tiles = 1u << 24, bytes = 1u << 25;
    if (~d & (bfloat16 | tiles | bytes) || !__builtin_cpu_supports("avx512bf16")) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#elif defined(__x86_64__)
bool has_matrices() { return false; }
#endif

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
        has_matrices() ? &amx_kernels : nullptr,
    };
#else
    static const Kernels* const found[] = {&scalar_kernels};
#endif
    return level >= 0 && level < int(sizeof found / sizeof *found) ? found[level] : nullptr;
}

}  // namespace attar

using namespace attar;

namespace {

constexpr int64_t BLOCK_BYTES = 16 << 20;   // activation codes of a call: they stay in the last cache
constexpr int64_t RANGE = 2304;             // k of one pass: a tile's activations stay in the L1 cache
constexpr int64_t WHOLE = 1536;             // k that a tile takes at once, however few it prefers
constexpr int64_t FEWEST_ROWS = 128;        // a thread's rows, below which unpacking the weights would show

constexpr int64_t LEAST_NARROW = 2;          // steps that are worth being widened
constexpr float SMALLEST = 1e-15f;           // a channel scale that a product with its inverse can stand for

thread_local Buffer shared_buffer, own_buffer, call_buffer;

// 1 / scale (k,) where products with these, and their remainders, are normal numbers; else null.
const float* inverses_of(const float* scale, int64_t k, float* inverse) {
    bool normal = true;
    for (int64_t i = 0; i < k; ++i) {
        const float size = __builtin_fabsf(scale[i]);
        normal &= size > SMALLEST && size < 1 / SMALLEST;
        inverse[i] = 1 / scale[i];
    }
    return normal ? inverse : nullptr;
}

// Replaces `count` numbers of a type by the same in float32, which are written to `free`; that is moved behind them.
void widen(const float*& numbers, int64_t count, int32_t dtype, float*& free) {
    if (dtype == FLOAT32) return;
    const float* const from = numbers;
    if (dtype == INT8)
        for (int64_t i = 0; i < count; ++i) free[i] = reinterpret_cast<const int8_t*>(from)[i];
    else
        for (int64_t i = 0; i < count; i += LANES) store_some(free, i, FLOAT32, count - i, load_some(from, i, dtype, count - i));
    numbers = free;
    free += count;
}

// How many numbers a step's a and b are.
int64_t first_count(const Step& step, int64_t k) { return step.kind == KRONECKER ? step.rows * int64_t(step.rows) : k; }
int64_t second_count(const Step& step) {
    const int64_t side = step.kind == KRONECKER ? step.cols : step.kind == HADAMARD ? step.rows : 0;
    return side * side;
}

// Makes bias and steps what the kernels read: float32, and with the inverses of channel scales. False when there is not
// enough memory.
bool prepare(Linear& call) {
    const int64_t k = call.weight.k, n = call.bias ? call.weight.n : 0;
    int64_t numbers = n;
    for (int i = 0; i < call.n_steps; ++i)
        numbers += (call.steps[i].kind == CHANNEL_SCALE ? 2 : 1) * first_count(call.steps[i], k) + second_count(call.steps[i]);
    Step* steps = static_cast<Step*>(call_buffer.reserve(call.n_steps * sizeof(Step) + numbers * sizeof(float)));
    if (!steps) return numbers == 0;
    float* free = reinterpret_cast<float*>(steps + call.n_steps);
    if (n) widen(call.bias, n, call.bias_dtype, free);
    for (int i = 0; i < call.n_steps; ++i) {
        Step& step = steps[i] = call.steps[i];
        widen(step.a, first_count(step, k), step.dtype, free);
        if (step.b) widen(step.b, second_count(step), step.dtype, free);
        if (step.kind != CHANNEL_SCALE) continue;
        step.b = inverses_of(step.a, k, free);
        free += k;
    }
    call.steps = steps;
    return true;
}

// One block of rows: [first, first + rows) of x, whose codes, scales and offsets are in the shared buffer.
struct Block {
    int64_t first, rows, padded;
    int64_t range;  // k of one pass
    int8_t* codes;
    float* scale;
    int32_t* offset;
};

// The task of a thread: outputs [n0, n1), at most `strips` strips, and rows [r0, r1) of the block.
struct Task {
    int64_t n0, n1, r0, r1, strips;
};

// Bytes that a thread needs for tasks of that size: unpacked weights of one range, and sums between the ranges.
int64_t panel_bytes(const Kernels& kernels, const Block& block, int64_t strips) {
    return strips * kernels.strip * block.range;
}

// k of one tile: equal parts of a range. Up to WHOLE, sums that stay in registers are worth more than rows that stay in
// the L1 cache.
int64_t depth_of(const Kernels& kernels, const Block& block) {
    if (!kernels.depth || block.padded <= WHOLE) return block.range;
    return round_up(parts_of(block.range, parts_of(block.range, kernels.depth)), 64);
}

int64_t sums_bytes(const Kernels& kernels, const Block& block, int64_t strips, int64_t rows) {
    if (depth_of(kernels, block) == block.padded) return 0;
    if (block.range == block.padded) rows = kernels.max_rows;  // no sums of other rows are kept
    return round_up(rows, kernels.max_rows) * strips * kernels.strip * 4;
}

// The branch from a row and an output on. Numbers of matrices are two bytes, and those of two rows of `up` side by side.
void place_branch(const Branch& whole, int64_t row, int64_t output, Branch& part) {
    if (!whole.rank) return;
    part.low = static_cast<const char*>(whole.low) + row * whole.rank * (whole.matrices ? 2 : 4);
    part.up = static_cast<const char*>(whole.up) + output * 4;
}

// Steps of a tile whose sums of products stay in 16 bits: each adds two products, of the largest code of the weight, stored
// without a sign, and the activations' smallest.
int64_t narrow_steps(const Linear& call) {
    const int64_t steps = 32767 / (2 * ((int64_t(1) << call.weight.bits) - 1) << (call.act_bits - 1));
    return steps < LEAST_NARROW ? 0 : steps;
}

// Bytes of a tile's activations in another order.
int64_t halves_bytes(const Kernels& kernels, const Block& block) {
    return kernels.as_halves ? 2 * kernels.max_rows * depth_of(kernels, block) : 0;
}

void multiply(const Kernels& kernels, const Linear& call, const Block& block, const Task& task, uint8_t* memory) {
    const int bytes = call.y_dtype == FLOAT32 ? 4 : 2;
    const int64_t depth = depth_of(kernels, block);
    int8_t* halves = reinterpret_cast<int8_t*>(memory + panel_bytes(kernels, block, task.strips));
    int32_t* sums = reinterpret_cast<int32_t*>(halves + halves_bytes(kernels, block));
    void* state = kernels.enter ? kernels.enter() : nullptr;
    for (int64_t k = 0; k < block.padded; k += block.range) {
        const int64_t k1 = least(block.padded, k + block.range);
        for (int64_t n = task.n0; n < task.n1; n += kernels.strip)
            kernels.unpack(call.weight, n, k, k1, memory + (n - task.n0) * block.range);
        Tile tile;
        tile.y_stride = call.weight.n, tile.y_dtype = call.y_dtype, tile.gelu = call.gelu;
        tile.branch = call.branch, tile.added = nullptr;
        tile.narrow = narrow_steps(call);
        tile.state = state;
        for (int64_t r = task.r0; r < task.r1; r += kernels.max_rows) {
            int32_t* own = sums + (block.range == block.padded ? 0 : (r - task.r0) * task.strips * kernels.strip);
            for (int64_t from = k; from < k1; from += depth) {
                const int64_t to = least(k1, from + depth);
                tile.depth = (least(call.weight.k, to) - from + 3) / 4;
                tile.begin = from == 0, tile.end = to == block.padded;
                tile.x = block.codes + r * block.padded + from * kernels.max_rows;
                if (kernels.as_halves && !tile.narrow) kernels.as_halves(tile.x, tile.depth, halves), tile.x = halves;
                for (int64_t n = task.n0; n < task.n1; n += kernels.strip) {
                    tile.strip = memory + (n - task.n0) * block.range + (from - k) * kernels.strip;
                    tile.sums = depth == block.padded ? nullptr : own + (n - task.n0) * kernels.max_rows;
                    tile.offset = block.offset + r, tile.row_scale = block.scale + r;
                    tile.scale = call.weight.scale + n;
                    tile.bias = call.bias ? call.bias + n : nullptr;
                    place_branch(call.branch, block.first + r, n, tile.branch);
                    tile.y = static_cast<char*>(call.y) + ((block.first + r) * call.weight.n + n) * bytes;
                    tile.cols = int(least(kernels.strip, task.n1 - n));
                    kernels.tile(int(least(kernels.max_rows, task.r1 - r)), tile);
                }
            }
        }
    }
    if (kernels.leave) kernels.leave(state);
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
    Linear call = *pointer;
    if (!prepare(call)) return 1;
    const Kernels& kernels = *kernels_at(level);
    const int64_t n = call.weight.n, threads = most(1, call.threads);
    prefer_large_pages(call.y, call.m * n * (call.y_dtype == FLOAT32 ? 4 : 2));
    Block block;
    block.padded = round_up(call.weight.k, 64);
    block.range = round_up(parts_of(block.padded, parts_of(block.padded, RANGE)), 64);

    // Equal blocks of rows, equal panels of outputs, and where panels are few, parts of a block's rows.
    const int64_t fitting_rows = most(FEWEST_ROWS, BLOCK_BYTES / block.padded);
    const int64_t block_rows = round_up(parts_of(call.m, parts_of(call.m, fitting_rows)), kernels.max_rows);
    const int64_t strips = parts_of(n, kernels.strip);
    const int64_t fitting = most(1, kernels.panel / (kernels.strip * block.range));
    const int64_t panels = most(parts_of(strips, fitting), least(strips, threads));
    const int64_t panel_strips = parts_of(strips, panels), panel = panel_strips * kernels.strip;
    const int64_t parts = most(1, least(2 * threads / panels, block_rows / FEWEST_ROWS));
    const int64_t part_rows = round_up(parts_of(block_rows, parts), kernels.max_rows);

    char* memory = static_cast<char*>(shared_buffer.reserve(block_rows * (block.padded + 8)));
    if (!memory) return 1;
    block.codes = reinterpret_cast<int8_t*>(memory);
    block.scale = reinterpret_cast<float*>(memory + block_rows * block.padded);
    block.offset = reinterpret_cast<int32_t*>(block.scale + block_rows);
    const int64_t quantizing = block.padded * (2 * sizeof(float) + kernels.max_rows);
    const int64_t multiplying = panel_bytes(kernels, block, panel_strips) + halves_bytes(kernels, block) +
                                sums_bytes(kernels, block, panel_strips, part_rows);
    int failed = 0;

    for (block.first = 0; block.first < call.m; block.first += block_rows) {
        block.rows = least(block_rows, call.m - block.first);
#pragma omp parallel num_threads(int(threads))
        {
            uint8_t* own = static_cast<uint8_t*>(own_buffer.reserve(most(quantizing, multiplying)));
            if (!own) {
#pragma omp atomic write
                failed = 1;
            }
#pragma omp for schedule(static)
            for (int64_t r = 0; r < block.rows; r += kernels.max_rows)
                if (own)
                    kernels.quantize(call, block.first + r, least(kernels.max_rows, block.rows - r), block.padded, own,
                                     block.codes + r * block.padded, block.scale + r, block.offset + r);
#pragma omp for schedule(dynamic)
            for (int64_t t = 0; t < panels * parts; ++t) {
                const int64_t n0 = t / parts * panel, r0 = t % parts * part_rows;
                const Task task = {n0, least(n, n0 + panel), r0, least(block.rows, r0 + part_rows), panel_strips};
                if (own && task.r0 < task.r1 && task.n0 < task.n1) multiply(kernels, call, block, task, own);
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
