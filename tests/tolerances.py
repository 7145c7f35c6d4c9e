"""Every numeric tolerance of the tests, with its reason."""

# Two float64 evaluations of the same formula in a different order.
FLOAT64 = 1e-9
# A float32 loop of 100 steps against its float64 twin on contractive weights: about 10 roundings a
# step of 6e-8 each, which a contraction does not accumulate.
FLOAT32_LOOP = 2e-6
# The same loop through two float32 compilers: both are that far from the truth, on either side.
FLOAT32_PAIR = 2e-5
# float32 arithmetic of one layer against transformers or diffusers on the same inputs.
FLOAT32_LAYER = 1e-5
# Oracle values that are printed with six or seven digits.
PRINTED = 1e-6
