// Elementwise: y = activation(x + bias), a pass over memory. Bias and y are of type T, x of type X:
// the same, or float where T has 16 bits. y may be x where the types are the same.

#include "device.cuh"

// Each of the names in nnxp.kernels.ACTIVATIONS, with its option if it has one. Where the reference
// body has a limit at an infinity, so have these; where it has NaN, so have these.
namespace act {

struct identity {
    static INLINE float of(float x, float) { return x; }
};
struct relu {
    static INLINE float of(float x, float) { return x < 0.f ? 0.f : x; }
};
struct leaky_relu {
    static INLINE float of(float x, float slope) { return x < 0.f ? slope * x : x; }
};
struct elu {
    static INLINE float of(float x, float alpha) { return x < 0.f ? alpha * expm1f(x) : x; }
};
struct selu {
    static INLINE float of(float x, float) {
        return x < 0.f ? 1.7580993408473766f * expm1f(x) : 1.0507009873554805f * x;
    }
};
struct softplus {
    static INLINE float of(float x, float) { return relu::of(x, 0.f) + log1pf(expf(-fabsf(x))); }
};
struct softsign {
    static INLINE float of(float x, float) { return x / (1.f + fabsf(x)); }
};
struct sigmoid {
    static INLINE float of(float x, float) { return 1.f / (1.f + expf(-x)); }
};
struct hard_sigmoid {
    static INLINE float of(float x, float) {
        const float y = x / 6.f + 0.5f;
        return y < 0.f ? 0.f : y > 1.f ? 1.f : y;
    }
};
struct tanh {
    static INLINE float of(float x, float) { return tanhf(x); }
};
struct silu {
    static INLINE float of(float x, float) { return x / (1.f + expf(-x)); }
};
struct gelu {  // erfc: 1 + erf(x) would cancel on the left
    static INLINE float of(float x, float) { return 0.5f * x * erfcf(-0.7071067811865476f * x); }
};
struct gelu_tanh {  // x * sigmoid(2 u); where u overflows, the sigmoid is the right 0 or 1
    static INLINE float of(float x, float) {
        return x / (1.f + expf(-1.5957691216057308f * x * (1.f + 0.044715f * (x * x))));
    }
};
struct mish {  // beyond 40 the factor is 1, and n must not overflow
    static INLINE float of(float x, float) {
        const float e = expf(x > 40.f ? 40.f : x), n = e * (e + 2.f);
        return x * (n / (n + 2.f));
    }
};

}  // namespace act

// So many packs does a thread ask for before it waits for the first: 16 values, 32 or 64 bytes.
template <int V> constexpr int FLIGHT = V == 1 ? 4 : 16 / V;

template <class T, class Act, class X, int V>
INLINE Pack<T, V> applied(const Pack<X, V>& x, const float* bias, float option) {
    Pack<T, V> y;
    #pragma unroll
    for (int k = 0; k < V; ++k) y.at[k] = narrow<T>(Act::of(wide(x.at[k]) + bias[k], option));
    return y;
}

// y = activation(x) for n neighbours, both aligned to 16 bytes.
template <class X, class T, class Act>
__global__ void __launch_bounds__(256) activate(const X* x, T* y, Index n, float option) {
    constexpr int V = 16 / sizeof(T), U = FLIGHT<V>;
    const float none[V] = {};
    const Index first = (Index(blockIdx.x) * U * blockDim.x + threadIdx.x) * V;
    const Index step = Index(blockDim.x) * V;
    Pack<X, V> held[U];
    #pragma unroll
    for (int u = 0; u < U; ++u)
        if (first + u * step + V <= n) held[u] = load<V>(x + first + u * step);
    #pragma unroll
    for (int u = 0; u < U; ++u)
        if (first + u * step + V <= n)
            store(y + first + u * step, applied<T, Act>(held[u], none, option));
    const Index last = n / V * V + threadIdx.x;  // what does not fill a pack
    if (blockIdx.x == 0 && last < n)
        store(y + last, applied<T, Act>(load<1>(x + last), none, option));
}

// y = activation(x + bias) for rows of neighbours. A thread keeps to its V columns, so that it reads
// their bias once; the threads of a block lie side by side along the row, the rest along the rows.
template <class X, class T, class Act, int V>
__global__ void __launch_bounds__(256)
bias_act(const X* x, const T* bias, T* y, Index rows, Index cols, Index x_stride, Index y_stride,
         float option) {
    constexpr int U = FLIGHT<V>;
    const Index c = (Index(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (c >= cols) return;
    float b[V] = {};
    if (bias) {
        const Pack<T, V> pack = load<V>(bias + c);
        #pragma unroll
        for (int k = 0; k < V; ++k) b[k] = wide(pack.at[k]);
    }
    const Index step = blockDim.y;
    for (Index first = blockIdx.y * step * U + threadIdx.y; first < rows;
         first += gridDim.y * step * U) {
        Pack<X, V> held[U];
        #pragma unroll
        for (int u = 0; u < U; ++u) {
            const Index r = first + u * step;
            if (r < rows) held[u] = load<V>(x + r * x_stride + c);
        }
        #pragma unroll
        for (int u = 0; u < U; ++u) {
            const Index r = first + u * step;
            if (r < rows) store(y + r * y_stride + c, applied<T, Act>(held[u], b, option));
        }
    }
}
