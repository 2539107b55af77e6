// What the entry points and the kernels of each instruction set agree on. No C++ library, no torch.
#pragma once

#include <cstdint>

namespace attar {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };
enum StepKind : int32_t { CHANNEL_SCALE = 0, HADAMARD = 1, KRONECKER = 2, CHANNEL_SHIFT = 3 };
enum Gelu : int32_t { NO_GELU = 0, GELU_ERF = 1, GELU_TANH = 2 };

// One transform of a row of `rows * cols` (of a channel each: any) numbers; matrices are row-major.
struct Step {
    int32_t kind;
    int32_t rows, cols;  // Hadamard: base order and 2^m, repeated over the row; Kronecker: left and right width
    int32_t dtype;       // of a and b as the entry gets them; the kernels read float32
    const float* a;      // channel scale, shift (k,) | signs (k,) | left (rows, rows)
    const float* b;      // scale: set by the entry   | base (rows, rows) | right (cols, cols)
};

// A packed weight: n rows of k codes, `bits` bits each, stored as code + 2^(bits - 1).
struct Weight {
    const uint8_t* codes;
    int64_t n, k, row_bytes;
    int32_t bits, groups;  // groups: scales in a row
    const float* scale;    // (n, groups)
};

// A low-rank branch, low · up, or nothing where the rank is 0.
struct Branch {
    const void* low;  // float32 (m, rank)
    const void* up;   // float32 (rank, stride), zeros up to whole strips
    int64_t rank, stride;
    int32_t matrices;  // bfloat16 for matrix registers: low (m, rank), up (rank / 2, stride, 2), zeros up to whole registers
};

// y (m, n) = gelu(quantize(transform(x (m, k))) · codesᵀ · scales + bias + branch)
struct Linear {
    const void* x;
    void* y;
    int64_t m;
    Weight weight;
    const float* bias;  // (n,) or null; of bias_dtype as the entry gets it
    const float* clip;  // (2,) or null
    const Step* steps;
    int32_t n_steps, act_bits;
    int32_t full_range;  // of the codes of activations: step sizes have a sign
    int32_t x_dtype, y_dtype, bias_dtype;
    int32_t gelu;
    Branch branch;
    int32_t threads;
};

// A tile of the product: some rows of activations against one strip of weights, over a range of the depth.
struct Tile {
    const int8_t* x;         // (depth / run, max_rows, 4 run): runs of neighbouring k of each row; or Kernels::as_halves
    const uint8_t* strip;    // (depth, outputs of a strip, 4): four neighbouring k of each output
    int64_t depth;           // steps of four k
    int64_t narrow;          // of them, those whose products, two and two, never leave 16 bits when they are summed up, or 0
    int32_t* sums;           // (rows, outputs of a strip) between the ranges; null when there is one range
    bool begin, end;         // the first range starts from the offsets, the last one writes y
    const int32_t* offset;   // (rows,) what the stored offset of the codes adds to each sum, negated
    const float* row_scale;  // (rows,)
    const float* scale;      // (cols,)
    const float* bias;       // (cols,) or null
    Branch branch;           // from the first row and the first output on
    const float* added;      // (rows, outputs of a strip) what it adds, once that is computed, or null
    void* y;
    int64_t y_stride;        // in elements
    int32_t y_dtype, cols;
    int32_t gelu;
    void* state;             // of the thread, null unless the kernels have one
};

// Fake quantization of the rows of x (rows, k): clamped to [low_factor · min, high_factor · max], rounded in steps.
struct FakeQuantize {
    const float* x;
    int64_t rows, k;
    const float *low_factor, *high_factor;  // a row's own are `stride` apart: 0 where all rows share one
    int64_t stride;
    int32_t bits, full_range, threads;
    float *smallest, *largest;              // (rows,) written by the forward pass, read by the backward pass
    float* y;                               // (rows, k)
    const float* grad;                      // (rows, k), the gradient of y
    float *grad_x, *grad_low, *grad_high;   // (rows, k), and of the factors in each row (rows,)
};

// y_i (l, r) = leftᵀ · x_i · right for each of the rows x_i, and the gradients.
struct Kronecker {
    const float* x;
    int64_t rows;
    int32_t l, r;
    const float *left, *right, *right_t;  // (l, l), (r, r), and the right one transposed, for the backward pass
    float* y;
    const float* grad;
    float* grad_x;  // or null
    float* sums;    // or null; (parts, l · l + r · r): of left and right, summed over the rows of each part
    int64_t part;   // rows of a part, which do not depend on the number of threads
    int32_t threads;
};

// Rotations of parameters (count, n, n), and the gradient; `inverse` is written by the forward pass for the backward one.
struct Cayley {
    const float* parameter;
    int64_t count, n;
    float *inverse, *rotation;
    const float* grad;  // of the rotation
    float* grad_parameter;
};

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    int strip;     // outputs of a strip
    int max_rows;  // rows of the largest tile
    int depth;     // k of a tile that it prefers at most, a multiple of 64; 0: any
    int panel;     // bytes of unpacked weights of a thread: they stay in its L2 cache
    // Around the tiles that a thread computes, or null: set matrix registers up; finish the last tile and give them back.
    void* (*enter)();  // -> Tile::state
    void (*leave)(void* state);
    // `count` <= max_rows rows of activations -> Tile::x over `padded` k, their step sizes, and Tile::offset.
    // The kernels' own layout of Tile::x has run = 1 (bytes are broadcast in fours) or 16 (rows of a matrix register).
    // `scratch` has room for 2 · padded floats and max_rows · padded bytes.
    void (*quantize)(const Linear&, int64_t row, int64_t count, int64_t padded, void* scratch, int8_t* tile,
                     float* scale, int32_t* offset);
    // Codes of the outputs [first, first + strip) and of [k0, k1), multiples of 64, -> the layout of Tile::strip;
    // what the weight does not have is zero.
    void (*unpack)(const Weight&, int64_t first, int64_t k0, int64_t k1, uint8_t* strip);
    void (*tile)(int rows, const Tile&);
    // Tile::x as the tile takes it where nothing is narrow, in twice as many bytes; null where that is no other order.
    void (*as_halves)(const int8_t* x, int64_t depth, int8_t* to);
    // Weights of one output -> (k,) in `dtype`.
    void (*dequantize)(const Weight&, int64_t row, uint8_t* scratch, void* out, int32_t dtype);
    void (*fake_quantize)(const FakeQuantize&, int64_t row);
    void (*fake_quantize_backward)(const FakeQuantize&, int64_t row);
    // Rows [first, last); `scratch` has room for kronecker_scratch() floats. Backward: `sums` of those rows' part.
    void (*kronecker)(const Kronecker&, int64_t first, int64_t last, float* scratch);
    void (*kronecker_backward)(const Kronecker&, int64_t first, int64_t last, float* scratch, float* sums);
    void (*cayley)(const Cayley&, int64_t index);
    // `scratch` has room for 3 · n · n floats.
    void (*cayley_backward)(const Cayley&, int64_t index, float* scratch);
};

// Rows that one product takes together, so that short ones are worth a call.
inline int64_t kronecker_batch(int64_t l, int64_t r) { return l * r < 2048 ? 4096 / (l * r) : 1; }
inline int64_t kronecker_scratch(int64_t l, int64_t r) { return (2 * kronecker_batch(l, r) + 1) * l * r; }

// The kernels at `level` (0 is the slowest), or null where the processor or the build lacks them.
const Kernels* kernels_at(int level);

extern const Kernels scalar_kernels, avx2_kernels, avxvnni_kernels, avx512_kernels, amx_kernels;

}  // namespace attar
