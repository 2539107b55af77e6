// What the entry point of attention and its kernels agree on.
#pragma once

#include <cstdint>

#include "pieces.h"

namespace attar {

constexpr int64_t STRIP_WIDTH = 32;  // keys, or features of a value, of a tile

// Places of a tensor (batch, tokens, heads, width), in elements; neighbouring features are neighbours in memory.
struct Places {
    int64_t batch, token, head;
};

// o (batch, queries, heads, width) = softmax(scale · q kᵀ) v, all of bfloat16; o is contiguous, scale > 0.
struct Attention {
    const uint16_t *q, *k, *v;
    uint16_t* o;
    int64_t batch, queries, keys, heads, width;
    Places q_places, k_places, v_places;
    float scale;
    int32_t threads;
};

struct AttentionKernels {
    const char* name;
    int64_t tile;   // queries whose scores are computed at once
    int64_t block;  // queries of a task: they share what is fetched of a block of keys
    int64_t keys;   // of a block: between two corrections of the running softmax
    // Keys and values [first, first + `keys`) of a head (counted over the batch) in the order of the products:
    // keys (strips of keys, width / 2, COLUMNS, 2), values (strips of the width, `keys` / 2, COLUMNS, 2); a strip has
    // COLUMNS keys, or features.
    void (*pack)(const Attention&, int64_t head, int64_t first, uint16_t* keys, uint16_t* values);
    // Outputs of the queries [first, first + count), at most `block`, over all blocks of the packed keys.
    void (*attend)(const Attention&, int64_t head, int64_t first, int64_t count, const uint16_t* keys,
                   const uint16_t* values, void* scratch);
    int64_t (*scratch_bytes)(const Attention&);
};

extern const AttentionKernels avx512_attention, amx_attention;

namespace {

inline int64_t padded_width(const Attention& call) { return round_up(call.width, STRIP_WIDTH); }

}  // namespace

}  // namespace attar
