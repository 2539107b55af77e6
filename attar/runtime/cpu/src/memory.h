// Memory that a thread keeps between calls: fresh pages would cost a few percent of each one.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace attar {
namespace {

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
