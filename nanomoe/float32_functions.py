"""Coefficients with which the compiled loops of training and of generation approximate functions in float32.

Knows no loop: numbers alone, which both kinds of loops take as constants.
"""

import numpy as np


def _float32(*numbers: float) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, numbers))


# Eigen's `generic_fast_erf`, within +-4: odd powers, of 1 to 13, over even ones, of 0 to 8.
ERF_ODD = _float32(
    -1.60960333262415e-02, -2.95459980854025e-03, -7.34990630326855e-04, -5.69250639462346e-05,
    -2.10102402082508e-06, 2.77068142495902e-08, -2.72614225801306e-10,
)  # fmt: skip
ERF_EVEN = _float32(
    -1.42647390514189e-02,
    -7.37332916720468e-03,
    -1.68282697438203e-03,
    -2.13374055278905e-04,
    -1.45660718464996e-05,
)

# Cephes' `expf`: ln 2 in two parts, and the coefficients of r**2 to r**7 within ln(2) / 2 of 0.
LN_2_HIGH, LN_2_LOW = _float32(0.693359375, -2.12194440e-4)
EXP_POWERS = _float32(
    5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4
)
