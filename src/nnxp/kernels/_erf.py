"""The error function and the tail of the normal distribution, for libraries that have none."""

from __future__ import annotations

from nnxp._arrays import Array, xp_of
from nnxp.kernels._dispatch import kernel

# All coefficients by ascending powers; bench/fit_erf.py found them.
FLOAT32 = (  # c, a, P, Q
    3.921875,
    0.3125,
    (
        0.564030647277832,
        0.02318868413567543,
        0.011813569813966751,
        -0.0006302644615061581,
        -5.4289277613861486e-05,
        -6.809078058722662e-06,
    ),
    (
        0.6913164258003235,
        0.3471231758594513,
        0.07889826595783234,
        0.010350726544857025,
        0.0008038386586122215,
        2.6320967663195916e-05,
    ),
)
FLOAT64 = (
    5.921875,
    0.21875,
    (
        0.7817151991116598,
        0.08976497646139794,
        0.031482018815281294,
        0.0017836699819392594,
        0.000253047172913826,
        6.406423427165435e-06,
        4.3830926018104305e-07,
        -1.1353575696816806e-08,
        -7.965378900795497e-10,
        -6.354184411088275e-11,
        -1.91992568596035e-12,
        -4.33187543972413e-14,
        -1.5349237997755173e-16,
    ),
    (
        0.8593778952885955,
        0.45403082483469887,
        0.11574450985900997,
        0.018880809822049285,
        0.002201938355200271,
        0.00019406975592691818,
        1.3300792557949018e-05,
        7.165114510896737e-07,
        3.016479114023227e-08,
        9.650899627488437e-10,
        2.189143373425572e-11,
        2.8578019458362775e-13,
        7.637139397590675e-16,
    ),
)


@kernel
def erf(x: Array) -> Array:
    """erf(x) = 2/sqrt(pi) * integral of exp(-t^2) from 0 to x; a new array like x

    As z (a + P(z^2) / Q(z^2)) for z = x clipped to [-c, c], beyond which erf is 1 in the type of
    x, with Q > 0: minimax coefficients for each type. Adding `a` last keeps the quotient, and so
    what its rounding adds, smaller than the sum.
    """
    xp = xp_of(x)
    native = getattr(xp, "erf", None)
    if native is not None:
        return native(x)
    c, a, p, q = FLOAT32 if x.dtype.itemsize == 4 else FLOAT64
    z = xp.clip(x, -c, c)
    t = z * z
    above, below = t * p[-1], t * q[-1]
    for i in range(len(p) - 2, 0, -1):
        above += p[i]
        above *= t
        below += q[i]
        below *= t
    above += p[0]
    below += q[0]
    y = above
    y /= below
    y += a
    y *= z
    return xp.clip(y, -1.0, 1.0, out=y)


TAIL32 = (  # P and Q, whose leading coefficient is 1
    (
        57.13908386230469,
        48.127742767333984,
        19.495059967041016,
        4.158513069152832,
        0.3989546298980713,
    ),
    (
        114.27816772460938,
        187.436279296875,
        131.40342712402344,
        49.83789825439453,
        10.425286293029785,
    ),
)
TAIL64 = (
    (
        185835.51176295703,
        281054.88749030605,
        210786.24814984022,
        100427.26704203473,
        33137.44540345021,
        7815.195410852792,
        1316.2448082907442,
        153.02891046448894,
        11.211912337739522,
        0.39894228039425883,
    ),
    (
        371671.02352591406,
        858660.3463497373,
        920848.8178628295,
        605105.6059717545,
        270566.6357046658,
        86306.37546082077,
        19971.376811609687,
        3327.440536365168,
        384.58659407030837,
        28.10409647521264,
    ),
)


def normal_tail(x: Array) -> Array:
    """1 - Phi(x) = erfc(x / sqrt(2)) / 2 for x from 0 to 100; a new array like x

    As exp(-x^2 / 2) P(x) / Q(x), Mills' ratio times the density: minimax coefficients for each
    type, all positive, so that nothing cancels. What rounding x^2 / 2 does to the exponential, up
    to x^2 / 2 units in the last place, is what rounding x itself does.
    """
    xp = xp_of(x)
    native = getattr(xp, "normal_tail", None)
    if native is not None:
        return native(x)
    p, q = TAIL32 if x.dtype.itemsize == 4 else TAIL64
    above, below = x * p[-1], x + q[-1]
    for above_next, below_next in zip(p[-2:0:-1], q[-2:0:-1], strict=True):
        above += above_next
        above *= x
        below *= x
        below += below_next
    above += p[0]
    below *= x
    below += q[0]
    above /= below
    density = xp.multiply(x, x, out=below)
    density *= -0.5
    above *= xp.exp(density, out=density)
    return above
