// What windows see of x (rows, d, h, w, channels), which may lie in any way: laid out for a product,
// multiplied channel by channel, or as one number for each channel. Results have no gaps.
//
// Four blocks on a multiprocessor are 64 registers for each thread: left alone, the compiler spills a
// few to make room for more blocks.

#include "device.cuh"
#include "act.cuh"

// Along an axis: `size` elements of x, `step` elements of memory apart, with windows of `window`
// elements. What a mean counts in is from `low` to below `high`, where x is from 0 to below size.
struct Axis {
    int size, step, window, stride, dilation, before, positions, low, high;
};

// Offsets within a row of x are less than 2^31.
struct Windows {
    int channels, channel_step;
    Axis d, h, w;
};

INLINE bool within(int i, const Axis& axis) { return unsigned(i) < unsigned(axis.size); }

// Where the window at `position` begins.
INLINE int start(int position, const Axis& axis) { return position * axis.stride - axis.before; }

// How many elements a mean over the window at `position` counts in.
INLINE int counted(int position, const Axis& axis) {
    int count = 0;
    #pragma unroll 1
    for (int k = 0, i = start(position, axis); k < axis.window; ++k, i += axis.dilation)
        count += i >= axis.low && i < axis.high;
    return count;
}

// f(k, address) for each element of a window, in order; the address is nullptr where it is padding.
template <class T, class F>
INLINE void over_window(const Windows& at, const T* x, int pd, int ph, int pw, F f) {
    int k = 0;
    #pragma unroll 1
    for (int a = 0, i = start(pd, at.d); a < at.d.window; ++a, i += at.d.dilation)
        #pragma unroll 1
        for (int b = 0, j = start(ph, at.h); b < at.h.window; ++b, j += at.h.dilation) {
            const bool inside = within(i, at.d) && within(j, at.h);
            const int first = inside ? i * at.d.step + j * at.h.step : 0;
            for (int c = 0, l = start(pw, at.w); c < at.w.window; ++c, l += at.w.dilation)
                f(k++, inside && within(l, at.w) ? x + (first + l * at.w.step) : nullptr);
        }
}

// y (lines, columns): what the windows see from the position `first` on, counted through all rows;
// columns beyond window * channels are zeros. A thread keeps to its V columns, and asks for four lines
// before it waits for the first.
template <class T, int V>
__global__ void __launch_bounds__(256, 4)
patches(const T* __restrict__ x, T* __restrict__ y, Index row_step, Index first, Index lines,
        Index columns, Windows at) {
    constexpr int U = 4;
    const unsigned c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (c >= columns) return;
    unsigned k = c / at.channels;
    const int right = int(k % at.w.window) * at.w.dilation;
    k /= at.w.window;
    const int down = int(k % at.h.window) * at.h.dilation;
    k /= at.h.window;
    const int deep = int(k) * at.d.dilation;
    const bool filled = k < at.d.window;
    x += int(c % at.channels) * at.channel_step;
    const unsigned step = blockDim.y, end = lines;
    for (unsigned line = blockIdx.y * step * U + threadIdx.y; line < end;
         line += gridDim.y * step * U) {
        Pack<T, V> held[U] = {};
        #pragma unroll
        for (int u = 0; u < U; ++u) {
            if (line + u * step >= end) continue;
            unsigned p = unsigned(first) + line + u * step;
            const int l = start(p % at.w.positions, at.w) + right;
            p /= at.w.positions;
            const int j = start(p % at.h.positions, at.h) + down;
            p /= at.h.positions;
            const int i = start(p % at.d.positions, at.d) + deep;
            const Index row = p / at.d.positions;
            if (filled && within(i, at.d) && within(j, at.h) && within(l, at.w))
                held[u] = load<V>(x + row * row_step + (i * at.d.step + j * at.h.step + l * at.w.step));
        }
        #pragma unroll
        for (int u = 0; u < U; ++u)
            if (line + u * step < end) store(y + (line + u * step) * columns + c, held[u]);
    }
}

// Threads side by side along the last axis of positions and its channels, V of them each; the rest
// along the lines, which are all other axes: f(y, row of x, channel, the three positions).
template <int V, class T, class F>
__device__ __forceinline__ void over_lines(T* y, Index lines, int channels, const Windows& at, F f) {
    const unsigned t = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    const unsigned width = unsigned(at.w.positions) * channels;
    if (t >= width) return;
    const int c = t % channels, pw = t / channels;
    const unsigned end = lines;
    #pragma unroll 1
    for (unsigned line = blockIdx.y * blockDim.y + threadIdx.y; line < end;
         line += gridDim.y * blockDim.y) {
        const unsigned ph = line % at.h.positions, above = line / at.h.positions;
        const unsigned pd = above % at.d.positions, row = above / at.d.positions;
        f(y + Index(line) * width + t, Index(row), c, int(pd), int(ph), pw);
    }
}

// y = activation(sum over the window of x weight + bias), each channel by itself: weight (window,
// outputs), bias (outputs,), of which neighbours see the same channel if there are more outputs.
template <class T, class Act, int V>
__global__ void __launch_bounds__(256, 4)
by_channel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
           T* __restrict__ y, Index row_step, Index lines, Index outputs, float a, float b,
           Windows at) {
    const int each = int(outputs) / at.channels;
    over_lines<V>(y, lines, outputs, at, [&](T* to, Index row, int c, int pd, int ph, int pw) {
        float sum[V] = {};
        const T* from = x + row * row_step + c / each * at.channel_step;
        over_window(at, from, pd, ph, pw, [&](int k, const T* seen) {
            const Pack<T, V> weights = load<V>(weight + k * outputs + c);
            Pack<T, V> pack = {};  // zeros are multiplied, too: by an infinite weight it is NaN
            if (seen) pack = load<V>(seen);
            #pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += wide(pack.at[v]) * wide(weights.at[v]);
        });
        Pack<T, V> added = {}, made;
        if (bias) added = load<V>(bias + c);
        #pragma unroll
        for (int v = 0; v < V; ++v)
            made.at[v] = narrow<T>(Act::of(sum[v] + wide(added.at[v]), a, b));
        store(to, made);
    });
}

namespace pool {

struct maximum {
    static INLINE float first() { return __int_as_float(0xff800000); }
    static INLINE float of(float a, float b) { return a != a || a > b ? a : b; }  // keeps NaN
    static INLINE float last(float v, float) { return v; }
};
struct mean {
    static INLINE float first() { return 0.f; }
    static INLINE float of(float a, float b) { return a + b; }
    static INLINE float last(float v, float count) { return v / count; }
};

}  // namespace pool

// y = the largest of what a window sees of x, or the mean, over what counts.
template <class T, class Op, int V>
__global__ void __launch_bounds__(256, 4)
pooled(const T* __restrict__ x, T* __restrict__ y, Index row_step, Index lines, Windows at) {
    over_lines<V>(y, lines, at.channels, at, [&](T* to, Index row, int c, int pd, int ph, int pw) {
        float held[V];
        #pragma unroll
        for (int v = 0; v < V; ++v) held[v] = Op::first();
        const T* from = x + row * row_step + c * at.channel_step;
        over_window(at, from, pd, ph, pw, [&](int, const T* seen) {
            if (!seen) return;
            const Pack<T, V> pack = load<V>(seen);
            #pragma unroll
            for (int v = 0; v < V; ++v) held[v] = Op::of(held[v], wide(pack.at[v]));
        });
        const int count = counted(pd, at.d) * counted(ph, at.h) * counted(pw, at.w);
        Pack<T, V> made;
        #pragma unroll
        for (int v = 0; v < V; ++v) made.at[v] = narrow<T>(Op::last(held[v], count > 1 ? count : 1));
        store(to, made);
    });
}
