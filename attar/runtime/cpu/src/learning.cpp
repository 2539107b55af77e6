// The C entry points of training: rows are divided among threads, and no sum depends on how many there are.
#include "kernels.h"
#include "memory.h"

using namespace attar;

namespace {

thread_local Buffer buffer;

float* scratch_of(const Kronecker& call) {
    return static_cast<float*>(buffer.reserve(kronecker_scratch(call.l, call.r) * sizeof(float)));
}

}  // namespace

extern "C" {

void attar_fake_quantize(const FakeQuantize* call, int level) {
    const Kernels& kernels = *kernels_at(level);
#pragma omp parallel for num_threads(call->threads) schedule(static)
    for (int64_t row = 0; row < call->rows; ++row) kernels.fake_quantize(*call, row);
}

void attar_fake_quantize_backward(const FakeQuantize* call, int level) {
    const Kernels& kernels = *kernels_at(level);
#pragma omp parallel for num_threads(call->threads) schedule(static)
    for (int64_t row = 0; row < call->rows; ++row) kernels.fake_quantize_backward(*call, row);
}

// Forward, or backward where there is a gradient. Returns 0, or 1 when there is not enough memory.
int attar_kronecker(const Kronecker* pointer, int level) {
    const Kronecker& call = *pointer;
    const Kernels& kernels = *kernels_at(level);
    int failed = 0;
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int64_t part = 0; part < (call.rows + call.part - 1) / call.part; ++part) {
        const int64_t first = part * call.part, end = first + call.part, last = end < call.rows ? end : call.rows;
        float* scratch = scratch_of(call);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        } else if (call.grad) {
            const int64_t size = int64_t(call.l) * call.l + int64_t(call.r) * call.r;
            kernels.kronecker_backward(call, first, last, scratch, call.sums ? call.sums + part * size : nullptr);
        } else {
            kernels.kronecker(call, first, last, scratch);
        }
    }
    return failed;
}

// The same; a few small matrices are no work for several threads.
int attar_cayley(const Cayley* call, int level) {
    const Kernels& kernels = *kernels_at(level);
    float* scratch = call->grad ? static_cast<float*>(buffer.reserve(3 * call->n * call->n * sizeof(float))) : nullptr;
    if (call->grad && !scratch) return 1;
    for (int64_t i = 0; i < call->count; ++i) {
        if (call->grad)
            kernels.cayley_backward(*call, i, scratch);
        else
            kernels.cayley(*call, i);
    }
    return 0;
}
}
