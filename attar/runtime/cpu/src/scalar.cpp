// No instruction beyond what every processor of the architecture has; the compiler vectorizes what it can.
#include "tile.h"

namespace attar {
namespace {

struct Scalar {
    struct Vector {
        int32_t sums[16];
    };
    typedef const uint8_t* Weights;
    typedef const int8_t* Values;
    static constexpr int WIDTH = 16, VECTORS = 1, ROWS = 2;
    static constexpr bool NARROW = false;
    static INLINE Vector zero() { return Vector{}; }
    static INLINE Weights load_weights(const uint8_t* p) { return p; }
    static INLINE Values broadcast(const int8_t* p) { return p; }
    static INLINE Vector dot(Vector v, Weights w, Values x) {
        for (int i = 0; i < WIDTH; ++i)
            for (int j = 0; j < 4; ++j) v.sums[i] += int32_t(w[4 * i + j]) * x[j];
        return v;
    }
    static INLINE Vector load_sums(const int32_t* p) { return load<Vector>(p); }
    static INLINE void store_sums(int32_t* p, Vector v) { attar::store(p, v); }
};

}  // namespace

const Kernels scalar_kernels = kernels_of<Scalar>("scalar");

}  // namespace attar
