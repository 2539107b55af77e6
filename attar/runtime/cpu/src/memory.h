// Memory that a thread keeps between calls: fresh pages would cost a few percent of each one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace attar {
namespace {

// Memory that is about to be written for the first time: small pages, which the system hands out one by one, can cost
// as much as what is computed into them. Only an advice.
inline void prefer_large_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

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

}  // namespace
}  // namespace attar
