// Each of the elementwise ones in nnxp.kernels.ACTIVATIONS, by the formula of its reference body,
// with the two options a and b, if it has so many. Where the reference has a limit at an infinity, so
// have these; where it has NaN, so have these: NaN is neither smaller nor larger than any bound.
namespace act {

INLINE float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
INLINE float below(float x, float high) { return x > high ? high : x; }
INLINE float above(float x, float low) { return x < low ? low : x; }

struct identity {
    static INLINE float of(float x, float, float) { return x; }
};

// Of straight lines

struct relu {
    static INLINE float of(float x, float, float) { return above(x, 0.f); }
};
struct relu6 {
    static INLINE float of(float x, float, float) { return clip(x, 0.f, 6.f); }
};
struct leaky_relu {
    static INLINE float of(float x, float slope, float) { return x < 0.f ? slope * x : x; }
};
struct threshold {
    static INLINE float of(float x, float least, float value) { return x <= least ? value : x; }
};
struct hard_tanh {
    static INLINE float of(float x, float low, float high) { return clip(x, low, high); }
};
struct hard_sigmoid {
    static INLINE float of(float x, float, float) { return clip(x + 3.f, 0.f, 6.f) / 6.f; }
};
struct hard_swish {
    static INLINE float of(float x, float, float) { return x * hard_sigmoid::of(x, 0.f, 0.f); }
};
struct hard_shrink {
    static INLINE float of(float x, float size, float) { return fabsf(x) <= size ? 0.f : x; }
};
struct soft_shrink {
    static INLINE float of(float x, float size, float) { return x - clip(x, -size, size); }
};

// Of one exponential

struct elu {
    static INLINE float of(float x, float alpha, float) { return x < 0.f ? alpha * expm1f(x) : x; }
};
struct selu {
    static INLINE float of(float x, float, float) {
        return x < 0.f ? 1.7580993408473766f * expm1f(x) : 1.0507009873554805f * x;
    }
};
struct celu {
    static INLINE float of(float x, float alpha, float) {
        return x < 0.f ? alpha * expm1f(x / alpha) : x;
    }
};
struct softplus {
    static INLINE float of(float x, float, float) {
        return above(x, 0.f) + log1pf(expf(-fabsf(x)));
    }
};
struct log_sigmoid {
    static INLINE float of(float x, float, float) {
        return below(x, 0.f) - log1pf(expf(-fabsf(x)));
    }
};
struct softsign {
    static INLINE float of(float x, float, float) { return x / (1.f + fabsf(x)); }
};
struct sigmoid {  // beyond 40 it is 1, and e must not overflow
    static INLINE float of(float x, float, float) {
        const float e = expf(below(x, 40.f));
        return e / (1.f + e);
    }
};
struct tanh {
    static INLINE float of(float x, float, float) { return tanhf(x); }
};
struct tanh_shrink {  // near 0 by Lambert's fraction: x - tanh(x) would cancel
    static INLINE float of(float x, float, float) {
        if (!(fabsf(x) < 2.f)) return x - tanhf(x);
        const float square = x * x;
        float c = square / 25.f;
        #pragma unroll
        for (int odd = 23; odd > 1; odd -= 2) c = square / (c + odd);
        return x * (c / (1.f + c));
    }
};

// x times a factor between 0 and 1

struct silu {
    static INLINE float of(float x, float, float) { return x * sigmoid::of(x, 0.f, 0.f); }
};
struct gelu {  // max(x, 0) - |x| (1 - Phi(|x|)), as nnxp.kernels._erf.normal_tail has it
    static INLINE float of(float x, float, float) {
        const float a = below(fabsf(x), 39.f);
        float p = 0.3989546298980713f, q = a + 10.425286293029785f;
        p = p * a + 4.158513069152832f, q = q * a + 49.83789825439453f;
        p = p * a + 19.495059967041016f, q = q * a + 131.40342712402344f;
        p = p * a + 48.127742767333984f, q = q * a + 187.436279296875f;
        p = p * a + 57.13908386230469f, q = q * a + 114.27816772460938f;
        return above(x, 0.f) - a * (p / q * expf(-0.5f * (a * a)));
    }
};
struct gelu_tanh {  // x * sigmoid(2 u)
    static INLINE float of(float x, float, float) {
        const float z = clip(x, -32.f, 8.f);
        const float e = expf(z * (0.07135481627260025f * (z * z) + 1.5957691216057308f));
        return x * (e / (1.f + e));
    }
};
struct mish {  // beyond 40 the factor is 1, and n must not overflow
    static INLINE float of(float x, float, float) {
        const float e = expf(below(x, 40.f)), n = e * (e + 2.f);
        return x * (n / (n + 2.f));
    }
};

}  // namespace act
