"""The numbers that the exponential function is made of: the same on every device, so that each
gives the same bits."""

LARGEST = 87.0  # where it ends: below minus this it is 0
SHIFT = 12582912.0  # 1.5 * 2**23: adding it rounds to a whole number, which stays in the low bits
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.42860682e-06  # ln 2 in two parts
# Of the polynomial for what is left of x, from the fifth power down; what follows them is 1 + x.
COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
