// Instructions of AVX-512, AVX-VNNI and AMX in plain C++, so that kernels that are made of them run, slowly, on any
// processor with AVX2. Included before a source file of attar/runtime/cpu/src; what is here is what those files use.
// Arithmetic follows Intel's manual: bfloat16 products take and give no subnormal numbers.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1  // after the compiler's own header, which must not believe it

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// What a processor with all of it says of itself, and the system that gives matrix registers out.
#undef __builtin_cpu_supports
#define __builtin_cpu_supports(name) 1
#define __get_cpuid_count(leaf, sub, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) 0

namespace emulated {

#define EMULATED static inline
#define FAST static __attribute__((noinline, unused, optimize("O3")))

template <class Number, int COUNT>
struct Of {
    Number at[COUNT];
};

template <class Number, class Vector>
EMULATED Of<Number, int(sizeof(Vector) / sizeof(Number))> lanes(const Vector& v) {
    Of<Number, int(sizeof(Vector) / sizeof(Number))> l;
    memcpy(&l, &v, sizeof v);
    return l;
}

template <class Vector, class Number, int COUNT>
EMULATED Vector vector(const Of<Number, COUNT>& l) {
    static_assert(sizeof l == sizeof(Vector), "same size");
    Vector v;
    memcpy(&v, &l, sizeof v);
    return v;
}

template <class Vector>
EMULATED Vector loadu(const void* from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

// The aligned forms fault on an address that is not.
template <class Vector>
EMULATED Vector load(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(Vector)) abort();
    return loadu<Vector>(from);
}

template <class Vector>
EMULATED void storeu(void* to, const Vector& v) {
    memcpy(to, &v, sizeof v);
}

template <class Number, class Vector, class Function>
EMULATED Vector each(const Vector& a, const Vector& b, Function function) {
    auto x = lanes<Number>(a);
    const auto y = lanes<Number>(b);
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(Number); ++i) x.at[i] = function(x.at[i], y.at[i]);
    return vector<Vector>(x);
}

template <class Vector, class Number>
EMULATED Vector all(Number number) {
    Of<Number, int(sizeof(Vector) / sizeof(Number))> l;
    for (Number& n : l.at) n = number;
    return vector<Vector>(l);
}

// Halves are combined with halves, as the compilers' own do.
template <class Function>
EMULATED float reduced(__m512 v, Function function) {
    auto l = lanes<float>(v);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) l.at[i] = function(l.at[i], l.at[i + step]);
    return l.at[0];
}

EMULATED float flushed(float v) {
    return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v;
}

EMULATED float widened(uint16_t half) {
    const uint32_t word = uint32_t(half) << 16;
    float v;
    memcpy(&v, &word, sizeof v);
    return flushed(v);
}

// To nearest, half to even.
EMULATED uint16_t bfloat16(float v) {
    v = flushed(v);
    uint32_t word;
    memcpy(&word, &v, sizeof word);
    if (v != v) return uint16_t(word >> 16 | 0x40);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

EMULATED float larger(float a, float b) { return a > b ? a : b; }

// One sum of AVX-512's dot product of pairs: the second numbers first, each product added with one rounding.
EMULATED float dot_of_pairs(float sum, const uint16_t* a, const uint16_t* b) {
    sum = flushed(std::fma(widened(a[1]), widened(b[1]), flushed(sum)));
    return flushed(std::fma(widened(a[0]), widened(b[0]), sum));
}

template <class Vector>
FAST Vector dpbusd(const Vector& sums, const Vector& u, const Vector& s) {
    auto total = lanes<int32_t>(sums);
    const auto a = lanes<uint8_t>(u);
    const auto b = lanes<int8_t>(s);
    for (unsigned i = 0; i < sizeof(Vector); ++i) total.at[i / 4] += a.at[i] * b.at[i];
    return vector<Vector>(total);
}

FAST __m512 dpbf16(__m512 sums, __m512bh a, __m512bh b) {
    auto total = lanes<float>(sums);
    const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
    for (int i = 0; i < 16; ++i) total.at[i] = dot_of_pairs(total.at[i], x.at + 2 * i, y.at + 2 * i);
    return vector<__m512>(total);
}

template <class Number, class Vector>
EMULATED Vector load_masked(uint64_t mask, const void* from) {
    Of<Number, int(sizeof(Vector) / sizeof(Number))> l = {};
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(Number); ++i)
        if (mask >> i & 1) memcpy(l.at + i, static_cast<const Number*>(from) + i, sizeof(Number));
    return vector<Vector>(l);
}

template <class Number, class Vector>
EMULATED void store_masked(void* to, uint64_t mask, const Vector& v) {
    const auto l = lanes<Number>(v);
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(Number); ++i)
        if (mask >> i & 1) memcpy(static_cast<Number*>(to) + i, l.at + i, sizeof(Number));
}

template <class To, class From, class Result, class Vector>
EMULATED Result converted(const Vector& v) {
    constexpr int COUNT = sizeof(Vector) / sizeof(From);
    const auto from = lanes<From>(v);
    Of<To, COUNT> to;
    for (int i = 0; i < COUNT; ++i) to.at[i] = To(from.at[i]);
    return vector<Result>(to);
}

EMULATED __m512i permuted(__m512i a, __m512i order, __m512i b) {
    const auto first = lanes<uint16_t>(a), second = lanes<uint16_t>(b), index = lanes<uint16_t>(order);
    Of<uint16_t, 32> to;
    for (int i = 0; i < 32; ++i) {
        const int from = index.at[i] & 63;
        to.at[i] = from < 32 ? first.at[from] : second.at[from - 32];
    }
    return vector<__m512i>(to);
}

EMULATED __m512i permuted_words(__m512i order, __m512i v) { return permuted(v, order, v); }

EMULATED __m512bh two_to_bfloat16(__m512 high, __m512 low) {
    const auto h = lanes<float>(high), l = lanes<float>(low);
    Of<uint16_t, 32> to;
    for (int i = 0; i < 16; ++i) to.at[i] = bfloat16(l.at[i]), to.at[i + 16] = bfloat16(h.at[i]);
    return vector<__m512bh>(to);
}

EMULATED __m256bh to_bfloat16(__m512 v) {
    const auto from = lanes<float>(v);
    Of<uint16_t, 16> to;
    for (int i = 0; i < 16; ++i) to.at[i] = bfloat16(from.at[i]);
    return vector<__m256bh>(to);
}

typedef uint32_t Words __attribute__((vector_size(64)));

EMULATED __m512 fused(__m512 a, __m512 b, __m512 c) {
    auto x = lanes<float>(a);
    const auto y = lanes<float>(b), z = lanes<float>(c);
    for (int i = 0; i < 16; ++i) x.at[i] = __builtin_fmaf(x.at[i], y.at[i], z.at[i]);
    return vector<__m512>(x);
}

EMULATED __m256i half_of(__m512i v, int half) {
    __m256i to;
    memcpy(&to, reinterpret_cast<const char*>(&v) + 32 * half, sizeof to);
    return to;
}

// What a number is above the next smaller whole one.
EMULATED __m512 fractions(__m512 v) {
    return each<float>(v, v, [](float x, float) { return std::isinf(x) ? 0.0f : x - std::floor(x); });
}

EMULATED __m512 scaled(uint64_t mask, __m512 v, __m512 exponents) {
    auto x = lanes<float>(v);
    const auto by = lanes<float>(exponents);
    for (int i = 0; i < 16; ++i) {
        const float e = std::fmin(std::fmax(std::floor(by.at[i]), -2000.0f), 2000.0f);  // of a NaN: -2000
        x.at[i] = mask >> i & 1 ? (by.at[i] != by.at[i] ? by.at[i] : std::ldexp(x.at[i], int(e))) : 0.0f;
    }
    return vector<__m512>(x);
}

EMULATED uint16_t not_less(__m512 a, __m512 b) {
    const auto x = lanes<float>(a), y = lanes<float>(b);
    uint16_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= uint16_t(!(x.at[i] < y.at[i])) << i;
    return mask;
}

EMULATED uint32_t greater_words(__m512i a, __m512i b) {
    const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= uint32_t(x.at[i] > y.at[i]) << i;
    return mask;
}

// Of a processor's thread: eight registers of sixteen rows, and whether they were set up.
struct Matrices {
    alignas(64) uint8_t at[8][16][64];
    bool ready;
};
static thread_local Matrices matrices;

// Instructions fault before the shapes are loaded, here as there; only whole registers are used.
EMULATED uint8_t (*matrix(int number))[64] {
    if (!matrices.ready) abort();
    return matrices.at[number];
}

static inline void configure(const void* shapes) {
    const uint8_t* bytes = static_cast<const uint8_t*>(shapes);
    if (bytes[0] != 1 || bytes[1]) abort();
    for (int i = 0; i < 8; ++i)
        if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] || bytes[48 + i] != 16) abort();
    memset(&matrices, 0, sizeof matrices);
    matrices.ready = true;
}

static inline void load_matrix(int number, const void* from, int64_t stride) {
    for (int row = 0; row < 16; ++row)
        memcpy(matrix(number)[row], static_cast<const char*>(from) + row * stride, 64);
}

static inline void store_matrix(int number, void* to, int64_t stride) {
    for (int row = 0; row < 16; ++row) memcpy(static_cast<char*>(to) + row * stride, matrix(number)[row], 64);
}

FAST void dot_bytes(int to, int a, int b) {
    const auto rows = matrix(a), columns = matrix(b);
    for (int m = 0; m < 16; ++m) {
        int32_t sums[16];
        memcpy(sums, matrix(to)[m], 64);
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 64; ++n) sums[n / 4] += int8_t(rows[m][4 * k + n % 4]) * columns[k][n];
        memcpy(matrix(to)[m], sums, 64);
    }
}

// The two numbers of a pair have sums of their own, which come together at the end.
FAST void dot_pairs(int to, int a, int b) {
    const auto rows = matrix(a), columns = matrix(b);
    for (int m = 0; m < 16; ++m) {
        uint16_t row[32];
        float sums[16], parts[32] = {};
        memcpy(row, rows[m], 64);
        memcpy(sums, matrix(to)[m], 64);
        for (int k = 0; k < 16; ++k) {
            uint16_t column[32];
            memcpy(column, columns[k], 64);
            for (int n = 0; n < 32; ++n)
                parts[n] = flushed(std::fma(widened(row[2 * k + n % 2]), widened(column[n]), parts[n]));
        }
        for (int n = 0; n < 16; ++n) sums[n] = flushed(flushed(sums[n]) + flushed(parts[2 * n] + parts[2 * n + 1]));
        memcpy(matrix(to)[m], sums, 64);
    }
}

}  // namespace emulated

// clang-format off
#define _mm256_dpbusd_avx_epi32(sums, u, s) emulated::dpbusd<__m256i>(sums, u, s)

#define _mm512_setzero_si512() (__m512i{})
#define _mm512_setzero_ps() (__m512{})
#define _mm512_set1_epi16(v) emulated::all<__m512i>(int16_t(v))
#define _mm512_set1_epi32(v) emulated::all<__m512i>(int32_t(v))
#define _mm512_set1_ps(v) emulated::all<__m512>(float(v))
#define _mm512_set_epi16(...) \
    [] { const int16_t last_first[32] = {__VA_ARGS__}; emulated::Of<int16_t, 32> l; \
         for (int i = 0; i < 32; ++i) l.at[i] = last_first[31 - i]; return emulated::vector<__m512i>(l); }()

#define _mm512_load_ps(p) emulated::load<__m512>(p)
#define _mm512_load_si512(p) emulated::load<__m512i>(p)
#define _mm512_loadu_ps(p) emulated::loadu<__m512>(p)
#define _mm512_loadu_si512(p) emulated::loadu<__m512i>(p)
#define _mm512_storeu_ps(p, v) emulated::storeu(p, v)
#define _mm512_storeu_si512(p, v) emulated::storeu(p, v)
#define _mm512_maskz_loadu_ps(mask, p) emulated::load_masked<float, __m512>(mask, p)
#define _mm512_maskz_loadu_epi16(mask, p) emulated::load_masked<uint16_t, __m512i>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) emulated::store_masked<float, __m512>(p, mask, v)
#define _mm512_mask_storeu_epi16(p, mask, v) emulated::store_masked<uint16_t, __m512i>(p, mask, v)

#define _mm512_mul_ps(a, b) ((__m512)(a) * (__m512)(b))
#define _mm512_sub_ps(a, b) ((__m512)(a) - (__m512)(b))
#define _mm512_max_ps(a, b) emulated::each<float, __m512>(a, b, emulated::larger)
#define _mm512_fmadd_ps(a, b, c) emulated::fused(a, b, c)
#define _mm512_fmsub_ps(a, b, c) emulated::fused(a, b, -(__m512)(c))
#define _mm512_reduce_add_ps(v) emulated::reduced(v, [](float a, float b) { return a + b; })
#define _mm512_reduce_max_ps(v) emulated::reduced(v, emulated::larger)
#define _mm512_reduce_ps(v, down) emulated::fractions(v)
#define _mm512_maskz_scalef_ps(mask, v, by) emulated::scaled(mask, v, by)
#define _mm512_cmp_ps_mask(a, b, kind) emulated::not_less(a, b)
#define _mm512_cmpgt_epu16_mask(a, b) emulated::greater_words(a, b)
#define _mm512_cvtss_f32(v) (((__m512)(v))[0])

#define _mm512_dpbusd_epi32(sums, u, s) emulated::dpbusd<__m512i>(sums, u, s)
#define _mm512_dpbf16_ps(sums, a, b) emulated::dpbf16(sums, a, b)
#define _mm512_cvtne2ps_pbh(high, low) emulated::two_to_bfloat16(high, low)
#define _mm512_cvtneps_pbh(v) emulated::to_bfloat16(v)
#define _mm512_cvtepi32_epi8(v) emulated::converted<int8_t, int32_t, __m128i>(v)
#define _mm512_cvtepi32_epi16(v) emulated::converted<int16_t, int32_t, __m256i>(v)
#define _mm512_cvtepu8_epi32(v) emulated::converted<int32_t, uint8_t, __m512i>(v)
#define _mm512_cvtepu16_epi32(v) emulated::converted<int32_t, uint16_t, __m512i>((__m256i)(v))
#define _mm512_slli_epi32(v, by) ((__m512i)(emulated::Words(v) << (by)))
#define _mm512_permutexvar_epi16(order, v) emulated::permuted_words(order, v)
#define _mm512_permutex2var_epi16(a, order, b) emulated::permuted((__m512i)(a), order, (__m512i)(b))
#define _mm512_extracti64x4_epi64(v, half) emulated::half_of(v, half)
#define _mm512_castsi512_si256(v) emulated::half_of(v, 0)
#define _mm512_castsi512_ps(v) ((__m512)(v))

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) emulated::configure(shapes)
#define _tile_release() ((void)(emulated::matrices.ready = false))
#define _tile_zero(number) ((void)memset(emulated::matrix(number), 0, 1024))
#define _tile_loadd(number, from, stride) emulated::load_matrix(number, from, stride)
#define _tile_stored(number, to, stride) emulated::store_matrix(number, to, stride)
#define _tile_dpbsud(to, a, b) emulated::dot_bytes(to, a, b)
#define _tile_dpbf16ps(to, a, b) emulated::dot_pairs(to, a, b)
// clang-format on
