"""Finds the coefficients of nnxp's erf and normal tail: fit_erf.py [erf|tail|ratio] [TYPE]

Needs mpmath; takes two minutes and gives the same figures on every run.

erf(z) = z (a + P(t) / Q(t)), t = z*z, for |z| <= c, where c is where erf rounds to 1, and a was
chosen by trial. The common factor of P and Q is free: of many, keep the one whose rounded
coefficients, evaluated in the dtype, have the smallest largest error in ulp among those that reach
1 at c. P and Q are those of R = a + P / Q.

1 - Phi(x) = exp(-x^2 / 2) P(x) / Q(x) for 0 <= x <= c, where c is where it rounds to 0. There
x^2 / 2 has been rounded, so the fit may be off by 1 + x^2 / 2 times as much as at 0. The leading
coefficient of Q is 1, which saves a pass.

x (1 - Phi(x)) = exp(-x^2 / 2) v R(v), v = x / (x + k), for the same x, where k was chosen by trial:
R is Mills' ratio times x + k, and a constant. The fit takes less of what is allowed, 1 + x^2 / 8
times as much as at 0, for the sum of R has roundings of its own.
"""

import sys
from functools import reduce

import numpy as np
from mpmath import cos, erf, erfc, exp, fsum, log, lu_solve, matrix, mp, mpf, pi, sqrt

mp.dps = 70
ERF = {  # degree of P and of Q, c, a
    "float32": (5, 3.921875, 0.3125),
    "float64": (12, 5.921875, 0.21875),
}
TAIL = {  # degree of Q, one less for P; c
    "float32": (5, 14.5),
    "float64": (10, 38.625),
}
RATIO = {  # degree of R, k, c
    "float32": (9, 3.25, 14.5),
}


def horner(c, t):
    return reduce(lambda a, b: a * t + b, c[::-1])


def cosines(count):
    return [(1 - cos(pi * i / (count - 1))) / 2 for i in range(count)]


def fit(points, f, allowed, degrees, q_old, rounds):
    """The rational function R/Q next to f, by the largest |error| / allowed; and that error.

    Weighted linear least squares for R - f Q = 0, divided by the previous Q (Sanathanan & Koerner
    1963), the weights multiplied by the previous |relative error| (Lawson 1961): R/Q tends to the
    minimax rational.
    """
    (n, m), w, best = degrees, [mpf(1)] * len(points), None
    for k in range(rounds):
        rows = [
            [v**i / y for i in range(n + 1)] + [-(v**i) for i in range(1, m + 1)]
            for v, y in zip(points, f, strict=True)
        ]
        g = [a / (q * d) ** 2 for a, q, d in zip(w, q_old, allowed, strict=True)]
        A, r = matrix(n + m + 1, n + m + 1), matrix(n + m + 1, 1)
        for i in range(n + m + 1):
            r[i] = fsum(a * row[i] for a, row in zip(g, rows, strict=True))
            for j in range(i + 1):
                A[i, j] = A[j, i] = fsum(
                    a * row[i] * row[j] for a, row in zip(g, rows, strict=True)
                )
        x = list(lu_solve(A, r))
        p, q = x[: n + 1], [mpf(1), *x[n + 1 :]]
        q_old = [horner(q, v) for v in points]
        e = [
            abs(horner(p, v) / d / y - 1) / a
            for v, d, y, a in zip(points, q_old, f, allowed, strict=True)
        ]
        if min(q_old) > 0 and (best is None or max(e) < best[0]):
            best = max(e), p, q
        if k > 3:
            w = [a * d * len(points) / fsum(e) for a, d in zip(w, e, strict=True)]
    return best


def fit_erf(name):
    (n, c, a), dt, rng, best = ERF[name], np.dtype(name).type, np.random.default_rng(0), (np.inf,)
    b, points = mpf(c) ** 2, cosines(16 * n)
    f = [erf(sqrt(b * v)) / sqrt(b * v) if v else 2 / sqrt(pi) for v in points]
    start = [exp(b * v / 2) for v in points]
    error, r, q = fit(points, f, [1] * len(points), (n, n), start, 24)
    r, q = ([v / b**i for i, v in enumerate(k)] for k in (r, q))
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
    print(f"erf {name}: c {c}, a {a}, fit {mp.nstr(error, 3)}, ulp {best[0]:.2f}, P, Q =")
    print(*best[1:], sep="\n")


def fit_tail(name):
    (n, c), dt = TAIL[name], np.dtype(name).type
    end = mpf(c) / (c + 2)  # as many points below 2 as above
    points = [2 * end * v / (1 - end * v) for v in cosines(28 * n)]
    f = [exp(v * v / 2) * erfc(v / sqrt(2)) / 2 for v in points]
    allowed = [1 + v * v / 2 for v in points]
    error, p, q = fit(points, f, allowed, (n - 1, n), [(1 + v) ** n for v in points], 40)
    P, Q = (np.array([float(v / q[-1]) for v in k]).astype(dt).tolist() for k in (p, q))
    print(f"tail {name}: c {c}, fit 2^{mp.nstr(log(error, 2), 4)}, P, Q =", P, Q, sep="\n")


def fit_ratio(name):
    (n, k, c), dt = RATIO[name], np.dtype(name).type
    points = [2 * c * v / (2 + c * (1 - v)) for v in cosines(28 * n)]
    f = [exp(v * v / 2) * erfc(v / sqrt(2)) / 2 * (v + k) for v in points]
    allowed = [1 + v * v / 8 for v in points]
    error, r, _ = fit([v / (v + k) for v in points], f, allowed, (n, 0), [mpf(1)] * len(f), 40)
    R = np.array([float(v) for v in r]).astype(dt).tolist()
    print(f"ratio {name}: c {c}, k {k}, fit 2^{mp.nstr(log(error, 2), 4)}, R =", R, sep="\n")


functions = {"erf": (fit_erf, ERF), "tail": (fit_tail, TAIL), "ratio": (fit_ratio, RATIO)}
for function in sorted(functions.keys() & set(sys.argv[1:]) or functions):
    find, types = functions[function]
    for name in sorted(types.keys() & set(sys.argv[1:]) or types):
        find(name)
