// The C entry point of attention: which tasks there are, and how they are divided among threads.
#include "attention.h"
#include "kernels.h"
#include "memory.h"

using namespace attar;

namespace {

constexpr int64_t PACKED_BYTES = 16 << 20;  // keys and values of the heads that are worked on: in the last cache

thread_local Buffer packed_buffer, scratch_buffer;

// The kernels beside the packed layers' of `level`, or null.
const AttentionKernels* attention_kernels(int level) {
#if defined(__x86_64__)
    static const bool pairs = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const Kernels* kernels = kernels_at(level);
    if (pairs && kernels == &avx512_kernels) return &avx512_attention;
    if (pairs && kernels == &amx_kernels) return &amx_attention;
#endif
    return nullptr;
}

}  // namespace

extern "C" {

// Name of the attention kernels beside the packed layers' of `level`, or null.
const char* attar_attention_kernels(int level) {
    const AttentionKernels* kernels = attention_kernels(level);
    return kernels ? kernels->name : nullptr;
}

// Returns 0, or 1 when there is not enough memory. Only where there are kernels at `level`.
int attar_attention(const Attention* pointer, int level) {
    const Attention& call = *pointer;
    const AttentionKernels& kernels = *attention_kernels(level);
    const int64_t heads = call.batch * call.heads, key_blocks = parts_of(call.keys, kernels.keys);
    const int64_t packed_block = kernels.keys * padded_width(call);
    const int64_t packed = key_blocks * packed_block;  // elements of a head's keys, and of its values
    const int64_t query_blocks = parts_of(call.queries, kernels.block);
    // As few heads as give every thread some tasks: what is packed of them is read where it still is near.
    const int64_t busy = parts_of(4 * most(1, call.threads), query_blocks);
    const int64_t together = most(1, least(least(heads, busy), PACKED_BYTES / (packed * 4)));
    const int64_t rows = round_up(parts_of(call.queries, query_blocks), kernels.tile);
    prefer_large_pages(call.o, heads * call.queries * call.width * 2);
    uint16_t* memory = static_cast<uint16_t*>(packed_buffer.reserve(together * packed * 4));
    if (!memory) return 1;
    int failed = 0;

    for (int64_t first = 0; first < heads; first += together) {
        const int64_t count = least(together, heads - first);
#pragma omp parallel num_threads(int(most(1, call.threads)))
        {
            void* scratch = scratch_buffer.reserve(kernels.scratch_bytes(call));
            if (!scratch) {
#pragma omp atomic write
                failed = 1;
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count * key_blocks; ++t) {
                uint16_t* keys = memory + t / key_blocks * 2 * packed + t % key_blocks * packed_block;
                kernels.pack(call, first + t / key_blocks, t % key_blocks * kernels.keys, keys, keys + packed);
            }
#pragma omp for schedule(dynamic)
            for (int64_t t = 0; t < count * query_blocks; ++t) {
                const int64_t head = t / query_blocks, query = t % query_blocks * rows;
                const uint16_t* keys = memory + head * 2 * packed;
                if (scratch && query < call.queries)
                    kernels.attend(call, first + head, query, least(rows, call.queries - query), keys, keys + packed,
                                   scratch);
            }
        }
    }
    return failed;
}
}
