// Elementwise: y = activation(x + bias), a pass over memory. Bias and y are of type T, x of type X:
// the same, or float where T has 16 bits. y may be x where the types are the same.

#include "device.cuh"
#include "act.cuh"

// So many packs does a thread ask for before it waits for the first: 16 values, 32 or 64 bytes.
template <int V> constexpr int FLIGHT = V == 1 ? 4 : 16 / V;

template <class T, class Act, class X, int V>
INLINE Pack<T, V> applied(const Pack<X, V>& x, const float* bias, float a, float b) {
    Pack<T, V> y;
    #pragma unroll
    for (int k = 0; k < V; ++k) y.at[k] = narrow<T>(Act::of(wide(x.at[k]) + bias[k], a, b));
    return y;
}

// y = activation(x) for n neighbours, both aligned to 16 bytes.
template <class X, class T, class Act>
__global__ void __launch_bounds__(256) activate(const X* x, T* y, Index n, float a, float b) {
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
            store(y + first + u * step, applied<T, Act>(held[u], none, a, b));
    const Index last = n / V * V + threadIdx.x;  // what does not fill a pack
    if (blockIdx.x == 0 && last < n)
        store(y + last, applied<T, Act>(load<1>(x + last), none, a, b));
}

// y = activation(x + bias) for rows of neighbours. A thread keeps to its V columns, so that it reads
// their bias once; the threads of a block lie side by side along the row, the rest along the rows.
template <class X, class T, class Act, int V>
__global__ void __launch_bounds__(256)
bias_act(const X* x, const T* bias, T* y, Index rows, Index cols, Index x_stride, Index y_stride,
         float a, float b) {
    constexpr int U = FLIGHT<V>;
    const Index c = (Index(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (c >= cols) return;
    float added[V] = {};
    if (bias) {
        const Pack<T, V> pack = load<V>(bias + c);
        #pragma unroll
        for (int k = 0; k < V; ++k) added[k] = wide(pack.at[k]);
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
            if (r < rows) store(y + r * y_stride + c, applied<T, Act>(held[u], added, a, b));
        }
    }
}
