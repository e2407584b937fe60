// CUDA on the host, as far as nnxp's kernels need it: the same sources, compiled by a C++ compiler
// and run block by block. Every thread of a block is a fiber. A warp runs until all its lanes meet
// at a shuffle, or at the block's barrier, where the warps wait for each other: so a warp runs ahead
// of the others as far as the barriers allow, in the order of warps or backwards, and what a missing
// barrier would let through goes wrong here too. Threads that part before a barrier are an error, and
// so is a shuffle whose mask leaves out who takes part in it.
// Numbers below the normal ones are flushed to zero, as CuPy tells the compiler to.

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <utility>
#include <vector>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define __host__
#define __device__
#define __global__ static
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    uint32_t x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

static long long clock64() {
    static long long cycles;
    return cycles += 100000;
}

static inline float __int_as_float(int bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

struct __half {
    _Float16 v;
};
static inline float __half2float(__half h) { return h.v; }
static inline __half __float2half_rn(float v) { return {_Float16(v)}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
static inline float __bfloat162float(__nv_bfloat16 b) { return __int_as_float(b.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (v != v) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace host {

enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };
struct Fiber {
    ucontext_t context;
    State state;
    std::unique_ptr<char[]> stack;
};
static const int WARP = 32, STACK = 1 << 16;
static std::vector<Fiber> fibers(1024);
static float exchanged[1024];
static ucontext_t scheduler;
static int current;
static const char* broken;

static void pause(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}

template <class F> struct Running {
    static const F* kernel;
    static void enter() {
        (*kernel)();
        fibers[current].state = DONE;
    }
};
template <class F> const F* Running<F>::kernel;

// Let every lane of a warp run until all have paused at the same place.
static bool advance(int warp, int threads, bool backwards) {
    const int first = warp * WARP, lanes = threads - first < WARP ? threads - first : WARP;
    for (;;) {
        for (int i = 0; i < lanes; ++i) {
            current = first + (backwards ? lanes - 1 - i : i);
            threadIdx = {current % blockDim.x, current / blockDim.x % blockDim.y,
                         current / blockDim.x / blockDim.y};
            if (fibers[current].state != DONE) swapcontext(&scheduler, &fibers[current].context);
        }
        for (int i = 1; i < lanes; ++i)
            if (fibers[first + i].state != fibers[first].state) return false;
        if (fibers[first].state != AT_SHUFFLE) return true;
    }
}

template <class F> const char* run_block(const F& kernel, bool backwards) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    const int warps = (threads + WARP - 1) / WARP;
    if (threads > 1024) return "more than 1024 threads in a block";
    Running<F>::kernel = &kernel;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
        fiber.context.uc_link = &scheduler;
        fiber.state = READY;
        makecontext(&fiber.context, Running<F>::enter, 0);
    }
    for (;;) {
        for (int i = 0; i < warps; ++i)
            if (!advance(backwards ? warps - 1 - i : i, threads, backwards))
                return "the lanes of a warp parted at a shuffle or a barrier";
        for (int i = 1; i < warps; ++i)
            if (fibers[i * WARP].state != fibers[0].state) return "warps parted at a barrier";
        if (broken || fibers[0].state == DONE) return broken;
    }
}

// Launch: an error in words, or nullptr. shape: the grid and the block.
template <class... Args, size_t... I>
const char* launch(void (*kernel)(Args...), const uint32_t* shape, void** args, bool backwards,
                   std::index_sequence<I...>) {
    const char* error = nullptr;
    host::broken = nullptr;
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // flush to zero
#endif
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    const auto thread = [&] { kernel(*static_cast<Args*>(args[I])...); };
    const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    for (uint64_t i = 0; i < blocks && !error; ++i) {
        const uint64_t b = backwards ? blocks - 1 - i : i;
        blockIdx = {uint32_t(b % gridDim.x), uint32_t(b / gridDim.x % gridDim.y),
                    uint32_t(b / gridDim.x / gridDim.y)};
        error = run_block(thread, backwards);
    }
#ifdef __SSE__
    _mm_setcsr(before);
#endif
    return error;
}

template <class... Args>
const char* launch(void (*kernel)(Args...), const uint32_t* shape, void** args, bool backwards) {
    return launch(kernel, shape, args, backwards, std::index_sequence_for<Args...>());
}

}  // namespace host

static inline void __syncthreads() { host::pause(host::AT_BARRIER); }

static inline float __shfl_xor_sync(uint32_t mask, float v, int lane) {
    const int here = host::current % host::WARP;
    if (!(mask >> here & mask >> (here ^ lane) & 1)) host::broken = "a shuffle's mask leaves out a lane";
    host::exchanged[host::current] = v;
    host::pause(host::AT_SHUFFLE);
    v = host::exchanged[host::current ^ lane];
    host::pause(host::AT_SHUFFLE);
    return v;
}

#define KERNEL(symbol, ...)                                                                        \
    extern "C" const char* symbol(const uint32_t* shape, void** args, int backwards) {             \
        return host::launch(&__VA_ARGS__, shape, args, backwards);                                 \
    }
