// GELU of the finished outputs of a tile, in float32. Only operations that round alike everywhere, so one result on
// every instruction set. Both stay within a few roundings of |x| of the reference's, infinities and NaN included.
// The polynomials are minimax fits.
#pragma once

#include "vectors.h"

namespace attar {
namespace {

// e^x to two units in the last place; 0 below -87 and infinity above 87.
INLINE Floats exponential(Floats x) {
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
    const Floats shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, the first of few bits
    Floats p = r * 0.00138144672f + 0.00836878084f;
    p = p * r + 0.0416683927f;
    p = p * r + 0.166665196f;
    p = p * r + 0.49999994f;
    p = p * r * r + r + 1.0f;
    Floats y = bits_of<Floats>(bits_of<Ints>(p) + (bits_of<Ints>(shifted) << 23));  // times 2^n
    y = chosen(greater(Floats{} - 87.0f, x), Floats{}, y);
    return chosen(greater(x, Floats{} + 87.0f), Floats{} + __builtin_inff(), y);
}

// x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), where (1 + tanh z) / 2 = 1 / (1 + e^{-2z}).
INLINE Floats gelu_tanh(Floats x) {
    return x / (1.0f + exponential(x * (x * x * -0.0713548163f - 1.59576912f)));
}

// x Φ(x), where Φ(-a) = erfc(a / √2) / 2, and erfc(b) = e^{-b²} times a polynomial of 1 / (1 + 0.4 b).
INLINE Floats gelu_erf(Floats x) {
    const Floats b = bits_of<Floats>(bits_of<Ints>(x) & 0x7fffffff) * 0.707106781f, t = 1.0f / (1.0f + 0.4f * b);
    Floats p = t * -0.200259045f + 0.709146559f;
    p = p * t - 0.370906711f;
    p = p * t + 0.468273222f;
    p = p * t + 0.161823928f;
    p = p * t + 0.231922045f;
    const Floats tail = 0.5f * p * t * exponential(-b * b);
    return x * chosen(greater(Floats{}, x), tail, 1.0f - tail);
}

}  // namespace
}  // namespace attar
