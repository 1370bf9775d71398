// The primitives of spike_ops.py for CPUs: see there for the states, the layout of a row's bytes, and the equations.
//
// Rows are independent and shared among threads. A row's bytes are worked on in spans of 64, each with its three
// elements, through all timesteps, so that membranes never leave the core. Loops have a fixed length and no reductions
// of floats among themselves: compilers turn them into vector instructions without being allowed to reorder sums.
// Compiled with -ffp-contract=off: the order of roundings is the reference's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int SPAN = 64, LANES = 16, PARTS = 3;
constexpr int MEMORYLESS = 0, RELEASED = 1;  // 2: normalized

struct bfloat16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }
inline void narrow(float value, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    out.bits = value != value ? 0x7fc0 : uint16_t(rounded);
}

// A row of D elements in `bytes` bytes: byte j holds elements j, j + bytes, j + 2 * bytes.
struct Row {
    int64_t width, bytes;
    // How many of the span's elements exist in this part.
    int count(int64_t first, int part) const {
        int64_t here = std::min<int64_t>(SPAN, bytes - first);
        return int(std::clamp<int64_t>(width - part * bytes - first, 0, here));
    }
};

template <typename X, typename M>
void load(const X* from, int count, M* to) {
    if (count == SPAN) {
        for (int i = 0; i < SPAN; ++i) to[i] = widen(from[i]);
    } else {
        for (int i = 0; i < SPAN; ++i) to[i] = i < count ? widen(from[i]) : M(0);
    }
}

template <typename X, typename M>
void store(const M* from, int count, X* to) {
    if (count == SPAN) {
        for (int i = 0; i < SPAN; ++i) narrow(from[i], to[i]);
    } else {
        for (int i = 0; i < count; ++i) narrow(from[i], to[i]);
    }
}

template <typename M>
struct Sums {
    M membrane[LANES] = {};
    int positive = 0, negative = 0, saturated = 0;
};

// The states of a span of membranes, and what they leave to the next timestep.
template <typename M>
void fire(const M* m, M alpha, M a, M leak, int reset, uint8_t* state, M* carry, Sums<M>& sums) {
    const M half = M(0.5) * a, largest = std::numeric_limits<M>::max();
    int32_t wide[SPAN];
    const bool known = a <= largest;  // an amplitude that is not finite must not pass for silence
    int positive = 0, negative = 0, saturated = 0;
    for (int i = 0; i < SPAN; ++i) {
        const M size = std::fabs(m[i]);
        const int32_t up = m[i] > half, down = m[i] < -half, beyond = size > a;
        positive += up;
        negative += down;
        saturated += beyond;
        wide[i] = known & (size <= largest) ? up + 2 * down + 2 * beyond : 5;
    }
    sums.positive += positive;
    sums.negative += negative;
    sums.saturated += saturated;
    for (int i = 0; i < SPAN; i += LANES)
        for (int l = 0; l < LANES; ++l) sums.membrane[l] += std::fabs(m[i + l]);
    for (int i = 0; i < SPAN; ++i) state[i] = uint8_t(wide[i]);
    if (reset == MEMORYLESS) return;
    const M poison = std::numeric_limits<M>::quiet_NaN();
    if (reset == RELEASED) {
        for (int i = 0; i < SPAN; ++i) {
            const M o = m[i] > half ? a : m[i] < -half ? -a : M(0);
            const M factor = wide[i] == 5 ? poison : alpha - o;
            carry[i] = (m[i] * leak) * factor;
        }
    } else {
        for (int i = 0; i < SPAN; ++i) carry[i] = (m[i] * leak) * (wide[i] == 0 ? M(1) : M(0));
    }
}

inline void unpack(const uint8_t* code, int count, int32_t (*state)[SPAN]) {
    uint8_t byte[SPAN] = {};
    std::memcpy(byte, code, size_t(count));
    for (int i = 0; i < SPAN; ++i) {
        const int32_t b = byte[i], sixth = (b * 171) >> 10;  // b / 6 for b < 216
        state[0][i] = b - 6 * sixth;
        const int32_t last = (sixth * 171) >> 10;
        state[1][i] = sixth - 6 * last;
        state[2][i] = last;
    }
}

template <typename X, typename M>
void encode(const X* x, int64_t stride_t, int64_t stride_n, const M* alpha, const M* floored, M leak, int reset,
            const M* carry_in, M* carry_out, uint8_t* code, double* stats, int64_t T, int64_t N, Row row, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t t = 0; t < T; ++t)
            for (int s = 0; s < 4; ++s) stats[(s * T + t) * N + n] = 0;
        for (int64_t j = 0; j < row.bytes; j += SPAN) {
            M carry[PARTS][SPAN] = {}, m[SPAN];
            uint8_t state[PARTS][SPAN];
            const int bytes = int(std::min<int64_t>(SPAN, row.bytes - j));
            if (carry_in)
                for (int p = 0; p < PARTS; ++p)
                    load(carry_in + n * row.width + p * row.bytes + j, row.count(j, p), carry[p]);
            for (int64_t t = 0; t < T; ++t) {
                Sums<M> sums;
                for (int p = 0; p < PARTS; ++p) {
                    load(x + t * stride_t + n * stride_n + p * row.bytes + j, row.count(j, p), m);
                    for (int i = 0; i < SPAN; ++i) m[i] = carry[p][i] + m[i];
                    fire(m, alpha[t], floored[t], leak, reset, state[p], carry[p], sums);
                }
                uint8_t byte[SPAN];
                for (int i = 0; i < SPAN; ++i) byte[i] = uint8_t(state[0][i] + 6 * state[1][i] + 36 * state[2][i]);
                std::memcpy(code + (t * N + n) * row.bytes + j, byte, size_t(bytes));
                double membrane = 0;
                for (int l = 0; l < LANES; ++l) membrane += sums.membrane[l];
                const double values[] = {membrane, double(sums.positive), double(sums.negative), double(sums.saturated)};
                for (int s = 0; s < 4; ++s) stats[(s * T + t) * N + n] += values[s];
            }
            if (carry_out)
                for (int p = 0; p < PARTS; ++p)
                    store(carry[p], row.count(j, p), carry_out + n * row.width + p * row.bytes + j);
        }
    }
}

template <typename X, typename M>
void decode(const uint8_t* code, const M* worth, X* out, int64_t T, int64_t N, Row row, int threads) {
    const M poison = std::numeric_limits<M>::quiet_NaN();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tn = 0; tn < T * N; ++tn) {
        const M a = worth[tn / N];
        for (int64_t j = 0; j < row.bytes; j += SPAN) {
            int32_t state[PARTS][SPAN];
            M o[SPAN];
            unpack(code + tn * row.bytes + j, int(std::min<int64_t>(SPAN, row.bytes - j)), state);
            for (int p = 0; p < PARTS; ++p) {
                for (int i = 0; i < SPAN; ++i) {
                    const int32_t c = state[p][i];
                    const M spike = c & 1 ? a : -a;
                    o[i] = c == 0 ? M(0) : c == 5 ? poison : spike;
                }
                store(o, row.count(j, p), out + tn * row.width + p * row.bytes + j);
            }
        }
    }
}

template <typename X, typename M>
void membrane_backward(const X* grad, const uint8_t* code, const M* alpha, const M* floored, M leak, int reset,
                       const M* grad_carry, X* grad_x, M* grad_carry_in, int64_t T, int64_t N, Row row, int threads) {
    const M poison = std::numeric_limits<M>::quiet_NaN();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t j = 0; j < row.bytes; j += SPAN) {
            M d[PARTS][SPAN] = {}, g[SPAN];
            int32_t state[PARTS][SPAN];
            const int bytes = int(std::min<int64_t>(SPAN, row.bytes - j));
            if (grad_carry)
                for (int p = 0; p < PARTS; ++p)
                    load(grad_carry + n * row.width + p * row.bytes + j, row.count(j, p), d[p]);
            for (int64_t t = T - 1; t >= 0; --t) {
                const M a = floored[t], raw = alpha[t];
                // Without a gradient of the carry nothing comes from behind the last timestep, not even 0 * NaN.
                const bool chained = reset != MEMORYLESS && (t < T - 1 || grad_carry);
                unpack(code + (t * N + n) * row.bytes + j, bytes, state);
                for (int p = 0; p < PARTS; ++p) {
                    const int count = row.count(j, p);
                    const int64_t at = (t * N + n) * row.width + p * row.bytes + j;
                    load(grad + at, count, g);
                    for (int i = 0; i < SPAN; ++i) g[i] = g[i] * (state[p][i] < 3 ? M(1) : M(0));
                    if (chained && reset == RELEASED) {
                        for (int i = 0; i < SPAN; ++i) {
                            const int32_t c = state[p][i];
                            const M spike = c & 1 ? a : -a, o = c == 0 ? M(0) : c == 5 ? poison : spike;
                            g[i] = g[i] + (d[p][i] * (raw - o)) * leak;
                        }
                    } else if (chained) {
                        for (int i = 0; i < SPAN; ++i) g[i] = g[i] + (d[p][i] * (state[p][i] == 0 ? M(1) : M(0))) * leak;
                    }
                    std::memcpy(d[p], g, sizeof g);
                    store(g, count, grad_x + at);
                }
            }
            if (grad_carry_in)
                for (int p = 0; p < PARTS; ++p)
                    store(d[p], row.count(j, p), grad_carry_in + n * row.width + p * row.bytes + j);
        }
    }
}

}  // namespace

#define SPIKE_OPS(NAME, X, M)                                                                                        \
    extern "C" void encode_##NAME(const void* x, int64_t stride_t, int64_t stride_n, const void* alpha,              \
                                  const void* floored, double leak, int reset, const void* carry_in, void* carry_out, \
                                  void* code, double* stats, int64_t T, int64_t N, int64_t width, int64_t bytes,     \
                                  int threads) {                                                                     \
        encode((const X*)x, stride_t, stride_n, (const M*)alpha, (const M*)floored, M(leak), reset,                  \
               (const M*)carry_in, (M*)carry_out, (uint8_t*)code, stats, T, N, Row{width, bytes}, threads);          \
    }                                                                                                                \
    extern "C" void decode_##NAME(const void* code, const void* worth, void* out, int64_t T, int64_t N,              \
                                  int64_t width, int64_t bytes, int threads) {                                       \
        decode((const uint8_t*)code, (const M*)worth, (X*)out, T, N, Row{width, bytes}, threads);                    \
    }                                                                                                                \
    extern "C" void membrane_backward_##NAME(const void* grad, const void* code, const void* alpha,                  \
                                             const void* floored, double leak, int reset, const void* grad_carry,    \
                                             void* grad_x, void* grad_carry_in, int64_t T, int64_t N, int64_t width, \
                                             int64_t bytes, int threads) {                                           \
        membrane_backward((const X*)grad, (const uint8_t*)code, (const M*)alpha, (const M*)floored, M(leak), reset,  \
                          (const M*)grad_carry, (X*)grad_x, (M*)grad_carry_in, T, N, Row{width, bytes}, threads);    \
    }

SPIKE_OPS(float32, float, float)
SPIKE_OPS(float64, double, double)
SPIKE_OPS(bfloat16, bfloat16, float)
