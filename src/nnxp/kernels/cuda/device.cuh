// What every kernel here is made of. All compute in float32 and round once, when they store.
//
// Sizes and strides are long long, counted in elements, and options are float: so Python has one
// rule for arguments. Pointers may alias where a kernel works in place, so none is __restrict__.
// NaN must go through: no fmaxf or fminf on data.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

typedef long long Index;

#define INLINE __host__ __device__ __forceinline__

INLINE float wide(float v) { return v; }
INLINE float wide(__half v) { return __half2float(v); }
INLINE float wide(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> INLINE T narrow(float v);
template <> INLINE float narrow<float>(float v) { return v; }
template <> INLINE __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> INLINE __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

INLINE float larger(float a, float b) { return a != a || a > b ? a : b; }
INLINE float smaller(float a, float b) { return a != a || a < b ? a : b; }

// V neighbours: 16 bytes of what is stored, moved by one instruction, or V = 1. What is loaded may be
// wider, and takes an instruction for each of its 16 bytes.
template <class T, int V> struct alignas(V * sizeof(T)) Pack {
    T at[V];
};

template <int V, class T> INLINE Pack<T, V> load(const T* from) {
    Pack<T, V> pack;
    if constexpr (V == 1) pack.at[0] = *from;
    else {
        #pragma unroll
        for (int i = 0; i < int(sizeof(pack) / 16); ++i)
            reinterpret_cast<uint4*>(pack.at)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    return pack;
}

template <int V, class T> INLINE void store(T* to, const Pack<T, V>& pack) {
    if constexpr (V == 1) *to = pack.at[0];
    else *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pack.at);
}
