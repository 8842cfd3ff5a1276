"""Instructions for tests that compare texts whose tokens were computed in other numbers at once."""

from cpu_kernels.isa import ISAS, available

# The best ones that multiply the same integers in any number of rows: AMX rounds many to bfloat16.
SAME_INTEGERS = next(name for name in available() if not ISAS[name].has_tiles)
# Those whose sums of signed weights a GPU has, too (see dot.as_on_a_gpu).
AS_ON_A_GPU = "avx2" if "avx2" in available() else SAME_INTEGERS
