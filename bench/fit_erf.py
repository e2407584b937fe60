"""Finds the coefficients of nnxp's erf: python bench/fit_erf.py [float32|float64]

Needs mpmath; takes half a minute and gives the same figures on every run.

erf(z) = z (a + P(t) / Q(t)), t = z*z, for |z| <= c, where c is where erf rounds to 1, and a was
chosen by trial.

1. Weighted linear least squares for R - f Q = 0, f(t) = erf(sqrt t) / sqrt t, at Chebyshev points
   of [0, c^2], divided by the previous Q (Sanathanan & Koerner 1963), the weights multiplied by the
   previous |relative error| (Lawson 1961): R/Q tends to the minimax rational. P = R - a Q.
2. The common factor of P and Q is free: of many, keep the one whose rounded coefficients, evaluated
   in the dtype, have the smallest largest error in ulp among those that reach 1 at c.
"""

import sys
from functools import reduce

import numpy as np
from mpmath import cos, erf, lu_solve, matrix, mp, mpf, pi, sqrt

mp.dps = 70
SPEC = {
    # degree of P and of Q, c, a
    "float32": (5, 3.921875, 0.3125),
    "float64": (12, 5.921875, 0.21875),
}


def horner(c, t):
    return reduce(lambda a, b: a * t + b, c[::-1])


def fit(n, c, rounds=24):
    b, count, size = mpf(c) ** 2, 16 * n, 2 * n + 1
    s = [(1 - cos(pi * i / (count - 1))) / 2 for i in range(count)]
    f = [erf(sqrt(b * v)) / sqrt(b * v) if v else 2 / sqrt(pi) for v in s]
    q_old, w, best = [mp.exp(b * v / 2) for v in s], [mpf(1)] * count, None
    for k in range(rounds):
        rows = [
            [v**i / y for i in range(n + 1)] + [-(v**i) for i in range(1, n + 1)]
            for v, y in zip(s, f, strict=True)
        ]
        g = [a / q**2 for a, q in zip(w, q_old, strict=True)]
        A, r = matrix(size, size), matrix(size, 1)
        for i in range(size):
            r[i] = mp.fsum(a * row[i] for a, row in zip(g, rows, strict=True))
            for j in range(i + 1):
                A[i, j] = A[j, i] = mp.fsum(
                    a * row[i] * row[j] for a, row in zip(g, rows, strict=True)
                )
        x = list(lu_solve(A, r))
        p, q = x[: n + 1], [mpf(1), *x[n + 1 :]]
        q_old = [horner(q, v) for v in s]
        e = [abs(horner(p, v) / d / y - 1) for v, d, y in zip(s, q_old, f, strict=True)]
        if min(q_old) > 0 and (best is None or max(e) < best[0]):
            best = max(e), [v / b**i for i, v in enumerate(p)], [v / b**i for i, v in enumerate(q)]
        if k > 3:
            w = [a * d * count / mp.fsum(e) for a, d in zip(w, e, strict=True)]
    return best


for name in sys.argv[1:] or SPEC:
    (n, c, a), dt, rng, best = SPEC[name], np.dtype(name).type, np.random.default_rng(0), (np.inf,)
    error, r, q = fit(n, c)
    p = [u - a * v for u, v in zip(r, q, strict=True)]
    z = np.append(rng.uniform(0, c, 60000), c).astype(dt)
    hi = np.array([float(erf(mpf(float(v)))) for v in z]).astype(dt)
    lo = np.array([float(erf(mpf(float(v))) - mpf(float(h))) for v, h in zip(z, hi, strict=True)])
    for scale in rng.uniform(0.5, 1, 2000):
        P, Q = (np.array([float(v * mpf(scale)) for v in k]).astype(dt) for k in (p, q))
        y = z * (dt(a) + horner(P, z * z) / horner(Q, z * z))
        worst = np.max(np.abs((np.minimum(y, dt(1)) - hi).astype(float) - lo) / np.spacing(hi))
        if y[-1] >= 1 and worst < best[0]:
            best = worst, P.tolist(), Q.tolist()
    print(
        f"{name}: c {c}, a {a}, fit {mp.nstr(error, 3)}, ulp {best[0]:.2f}, P, Q =",
        *best[1:],
        sep="\n",
    )
