// Over the rows of a matrix: y = op(x + before) * gain + after, any of the three left out. They and
// y are of type T, x of type X: the same, or float where T has 16 bits.
//
// An op is written once, in folds over the row and one last map. Its row comes in two kinds: short
// ones are held in the registers of a few lanes, long ones are streamed by a block, again for each
// fold. Statistics are sums of one partial sum for each thread, so their error stays small.

#include "device.cuh"

// Every lane of a group of G neighbours gets op over all of them.
template <int G, class Op> __device__ __forceinline__ float over_lanes(float v, Op op) {
    #pragma unroll
    for (int lane = G / 2; lane > 0; lane /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

// Every thread of the block gets op over all of them; a block is whole warps.
template <class Op> __device__ __forceinline__ float over_block(float v, Op op) {
    __shared__ float part[32];
    v = over_lanes<32>(v, op);
    __syncthreads();  // nobody reads the parts of the fold before this one any more
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = part[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) v = op(v, part[warp]);
    return v;
}

template <class X, class T> struct Matrix {
    const X* x;
    const T *before, *gain, *after;
    T* y;
    Index cols, x_stride, y_stride;

    // V values of x + before, from column c of a row on.
    template <int V> __device__ __forceinline__ void read(Index row, Index c, float* v) const {
        const Pack<X, V> pack = load<V>(x + row * x_stride + c);
        #pragma unroll
        for (int k = 0; k < V; ++k) v[k] = wide(pack.at[k]);
        if (before) {
            const Pack<T, V> more = load<V>(before + c);
            #pragma unroll
            for (int k = 0; k < V; ++k) v[k] += wide(more.at[k]);
        }
    }

    // Their results, times gain and plus after.
    template <int V> __device__ __forceinline__ void write(Index row, Index c, float* v) const {
        if (gain) {
            const Pack<T, V> factor = load<V>(gain + c);
            #pragma unroll
            for (int k = 0; k < V; ++k) v[k] *= wide(factor.at[k]);
        }
        if (after) {
            const Pack<T, V> more = load<V>(after + c);
            #pragma unroll
            for (int k = 0; k < V; ++k) v[k] += wide(more.at[k]);
        }
        Pack<T, V> pack;
        #pragma unroll
        for (int k = 0; k < V; ++k) pack.at[k] = narrow<T>(v[k]);
        store(y + row * y_stride + c, pack);
    }
};

// A row of scores of attention, in place: times the scale where its query may look at a key, minus
// infinity elsewhere. `seen` or `added` is the row's part of a mask, its keys `step` apart.
struct Scores {
    float* y;
    const bool* seen;
    const float* added;
    Index cols, step, last;  // the last key that it may look at
    float scale;

    template <int V> __device__ __forceinline__ void read(Index, Index c, float* v) const {
        const Pack<float, V> pack = load<V>(y + c);
        #pragma unroll
        for (int k = 0; k < V; ++k) {
            v[k] = scale * pack.at[k];
            if (added) v[k] += added[(c + k) * step];
            if (c + k > last || (seen && !seen[(c + k) * step])) v[k] = __int_as_float(0xff800000);
        }
    }

    template <int V> __device__ __forceinline__ void write(Index, Index c, float* v) const {
        Pack<float, V> pack;
        #pragma unroll
        for (int k = 0; k < V; ++k) pack.at[k] = v[k];
        store(y + c, pack);
    }
};

// Where a row of scores (n, heads, queries, keys) is in a mask of any strides.
struct Mask {
    const bool* seen;
    const float* added;
    Index heads, queries, n_step, head_step, query_step, key_step, causal;

    __device__ __forceinline__ Scores of(Index row, float* y, Index cols, float scale) const {
        const Index query = row % queries, head = row / queries % heads, n = row / queries / heads;
        const Index at = n * n_step + head * head_step + query * query_step;
        return {y + row * cols, seen ? seen + at : seen, added ? added + at : added, cols, key_step,
                causal ? query : cols, scale};
    }
};

// A row in the registers of G lanes, S packs of V in each. Lanes beyond the row take part in every
// shuffle and hold nothing: `cols` is 0 for them.
template <class M, int V, int G, int S> struct Held {
    const M& matrix;
    const Index row;
    const int cols;
    float v[S][V];

    __device__ __forceinline__ int column(int s) const { return (s * G + threadIdx.x % G) * V; }

    __device__ __forceinline__ Held(const M& matrix, Index row, Index rows)
        : matrix(matrix), row(row), cols(row < rows ? int(matrix.cols) : 0) {
        #pragma unroll
        for (int s = 0; s < S; ++s)
            if (column(s) < cols) matrix.template read<V>(row, column(s), v[s]);
    }

    template <class Op, class F> __device__ __forceinline__ float fold(float start, Op op, F f) const {
        #pragma unroll
        for (int s = 0; s < S; ++s)
            if (column(s) < cols) {
                #pragma unroll
                for (int k = 0; k < V; ++k) start = op(start, f(v[s][k]));
            }
        return over_lanes<G>(start, op);
    }

    template <class F> __device__ __forceinline__ void map(F f) {
        #pragma unroll
        for (int s = 0; s < S; ++s)
            if (column(s) < cols) {
                #pragma unroll
                for (int k = 0; k < V; ++k) v[s][k] = f(v[s][k]);
                matrix.template write<V>(row, column(s), v[s]);
            }
    }
};

// A row of any length, read again from memory or its caches each time.
template <class M, int V> struct Streamed {
    const M& matrix;
    const Index row, cols;

    __device__ __forceinline__ Streamed(const M& matrix, Index row)
        : matrix(matrix), row(row), cols(matrix.cols) {}

    template <class Op, class F> __device__ __forceinline__ float fold(float start, Op op, F f) const {
        float v[V];
        #pragma unroll 4
        for (Index c = Index(threadIdx.x) * V; c < cols; c += Index(blockDim.x) * V) {
            matrix.template read<V>(row, c, v);
            #pragma unroll
            for (int k = 0; k < V; ++k) start = op(start, f(v[k]));
        }
        return over_block(start, op);
    }

    template <class F> __device__ __forceinline__ void map(F f) {
        float v[V];
        for (Index c = Index(threadIdx.x) * V; c < cols; c += Index(blockDim.x) * V) {
            matrix.template read<V>(row, c, v);
            #pragma unroll
            for (int k = 0; k < V; ++k) v[k] = f(v[k]);
            matrix.template write<V>(row, c, v);
        }
    }
};

namespace op {

// Types of their own, not lambdas: so all sums of a kernel share the memory of over_block.
struct Larger {
    INLINE float operator()(float a, float b) const { return larger(a, b); }
};
struct Add {
    INLINE float operator()(float a, float b) const { return a + b; }
};

template <class Row, class F> __device__ __forceinline__ float largest(const Row& row, F f) {
    return row.fold(__int_as_float(0xff800000), Larger(), f);
}

template <class Row, class F> __device__ __forceinline__ float sum(const Row& row, F f) {
    return row.fold(0.f, Add(), f);
}

struct softmax {
    template <class Row> static __device__ __forceinline__ void run(Row& row, float) {
        const float m = largest(row, [](float v) { return v; });
        const float scale = 1.f / sum(row, [m](float v) { return expf(v - m); });
        row.map([m, scale](float v) { return expf(v - m) * scale; });
    }
};

struct attention {  // softmax, of which those that may look nowhere get zeros
    template <class Row> static __device__ __forceinline__ void run(Row& row, float) {
        float m = largest(row, [](float v) { return v; });
        m = m < -3.40282347e+38f ? -3.40282347e+38f : m;
        const float total = sum(row, [m](float v) { return expf(v - m); });
        const float scale = 1.f / (total < 1.f ? 1.f : total);
        row.map([m, scale](float v) { return expf(v - m) * scale; });
    }
};

struct softmin {  // softmax of -v
    template <class Row> static __device__ __forceinline__ void run(Row& row, float) {
        const float m = largest(row, [](float v) { return -v; });
        const float scale = 1.f / sum(row, [m](float v) { return expf(-v - m); });
        row.map([m, scale](float v) { return expf(-v - m) * scale; });
    }
};

struct log_softmax {
    template <class Row> static __device__ __forceinline__ void run(Row& row, float) {
        const float m = largest(row, [](float v) { return v; });
        const float log_sum = logf(sum(row, [m](float v) { return expf(v - m); }));
        row.map([m, log_sum](float v) { return v - m - log_sum; });
    }
};

struct layer_norm {
    template <class Row> static __device__ __forceinline__ void run(Row& row, float eps) {
        const float n = row.matrix.cols;
        const float mean = sum(row, [](float v) { return v; }) / n;
        const float var = sum(row, [mean](float v) { return (v - mean) * (v - mean); }) / n;
        const float scale = 1.f / sqrtf(var + eps);
        row.map([mean, scale](float v) { return (v - mean) * scale; });
    }
};

struct rms_norm {
    template <class Row> static __device__ __forceinline__ void run(Row& row, float eps) {
        const float n = row.matrix.cols;
        const float scale = 1.f / sqrtf(sum(row, [](float v) { return v * v; }) / n + eps);
        row.map([scale](float v) { return v * scale; });
    }
};

}  // namespace op

// G lanes for a row of at most G * S * V columns.
template <class X, class T, class Op, int V, int G, int S>
__global__ void __launch_bounds__(128)
held(const X* x, const T* before, const T* gain, const T* after, T* y, Index rows, Index cols,
     Index x_stride, Index y_stride, float eps) {
    const Matrix<X, T> matrix = {x, before, gain, after, y, cols, x_stride, y_stride};
    const Index at = (Index(blockIdx.x) * blockDim.x + threadIdx.x) / G;
    Held<Matrix<X, T>, V, G, S> row(matrix, at, rows);
    Op::run(row, eps);
}

// A block for a row.
template <class X, class T, class Op, int V>
__global__ void __launch_bounds__(1024, 1)  // or the compiler would spill for a second block
streamed(const X* x, const T* before, const T* gain, const T* after, T* y, Index rows, Index cols,
         Index x_stride, Index y_stride, float eps) {
    const Matrix<X, T> matrix = {x, before, gain, after, y, cols, x_stride, y_stride};
    Streamed<Matrix<X, T>, V> row(matrix, blockIdx.x);
    Op::run(row, eps);
}

// Attention's softmax over the keys of scores (n, heads, queries, keys), in place.
template <int V, int G, int S>
__global__ void __launch_bounds__(128)
held_scores(float* y, const bool* seen, const float* added, Index rows, Index cols, Index heads,
            Index queries, Index n_step, Index head_step, Index query_step, Index key_step,
            Index causal, float scale) {
    const Mask mask = {seen, added, heads, queries, n_step, head_step, query_step, key_step, causal};
    const Index at = (Index(blockIdx.x) * blockDim.x + threadIdx.x) / G;
    const Scores scores = mask.of(at, y, cols, scale);
    Held<Scores, V, G, S> row(scores, at, rows);
    op::attention::run(row, 0.f);
}

template <int V>
__global__ void __launch_bounds__(1024, 1)  // as above
streamed_scores(float* y, const bool* seen, const float* added, Index rows, Index cols, Index heads,
                Index queries, Index n_step, Index head_step, Index query_step, Index key_step,
                Index causal, float scale) {
    const Mask mask = {seen, added, heads, queries, n_step, head_step, query_step, key_step, causal};
    const Scores scores = mask.of(blockIdx.x, y, cols, scale);
    Streamed<Scores, V> row(scores, blockIdx.x);
    op::attention::run(row, 0.f);
}
