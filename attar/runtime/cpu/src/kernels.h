// What the entry points and the kernels of each instruction set agree on. No C++ library, no torch.
#pragma once

#include <cstdint>

namespace attar {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum StepKind : int32_t { CHANNEL_SCALE = 0, HADAMARD = 1, KRONECKER = 2 };

// One transform of a row of `rows * cols` (channel scale: any) numbers; matrices are row-major float32.
struct Step {
    int32_t kind;
    int32_t rows, cols;  // Hadamard: base order and 2^m, repeated over the row; Kronecker: left and right width
    const float* a;      // channel scale (k,) | signs (k,) | left (rows, rows)
    const float* b;      // unused             | base (rows, rows) | right (cols, cols)
};

// A packed weight: n rows of k codes, `bits` bits each, stored as code + 2^(bits - 1).
struct Weight {
    const uint8_t* codes;
    int64_t n, k, row_bytes;
    int32_t bits, groups;  // groups: scales in a row
    const float* scale;    // (n, groups)
};

// y (m, n) = quantize(transform(x (m, k))) · codesᵀ · scales + bias
struct Linear {
    const void* x;
    void* y;
    int64_t m;
    Weight weight;
    const float* bias;  // (n,) or null
    const float* clip;  // (2,) or null
    const Step* steps;
    int32_t n_steps, act_bits;
    int32_t x_dtype, y_dtype;
    int32_t threads;
};

// A tile of the product: some rows of activations against one strip of weights, over a range of the depth.
struct Tile {
    const int8_t* x;         // (depth, max_rows, 4): four neighbouring k of each row
    const uint8_t* strip;    // (depth, outputs of a strip, 4): four neighbouring k of each output
    int64_t depth;           // steps of four k
    int32_t* sums;           // (rows, outputs of a strip) between the ranges; null when there is one range
    bool begin, end;         // the first range starts from the offsets, the last one writes y
    const int32_t* offset;   // (rows,) what the stored offset of the codes adds to each sum, negated
    const float* row_scale;  // (rows,)
    const float* scale;      // (cols,)
    const float* bias;       // (cols,) or null
    void* y;
    int64_t y_stride;        // in elements
    int32_t y_dtype, cols;
};

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    int strip;     // outputs of a strip
    int max_rows;  // rows of the largest tile
    // `count` <= max_rows rows of activations -> Tile::x over `padded` k, their step sizes, and Tile::offset.
    // `scratch` has room for 2 · padded floats and max_rows · padded bytes.
    void (*quantize)(const Linear&, int64_t row, int64_t count, int64_t padded, void* scratch, int8_t* tile,
                     float* scale, int32_t* offset);
    // Codes of the outputs [first, first + strip) and of [k0, k1), multiples of 64, -> the layout of Tile::strip;
    // what the weight does not have is zero.
    void (*unpack)(const Weight&, int64_t first, int64_t k0, int64_t k1, uint8_t* strip);
    void (*tile)(int rows, const Tile&);
    // Weights of one output -> (k,) in `dtype`.
    void (*dequantize)(const Weight&, int64_t row, uint8_t* scratch, void* out, int32_t dtype);
};

extern const Kernels scalar_kernels, avx2_kernels, avxvnni_kernels, avx512_kernels;

}  // namespace attar
