"""Every numeric tolerance of the tests, with its reason."""

# Two float64 evaluations of the same formula in a different order.
FLOAT64 = 1e-9
# A float32 loop of 100 steps against its float64 twin on contractive weights: about 10 roundings a
# step of 6e-8 each, which a contraction does not accumulate.
FLOAT32_LOOP = 2e-6
# float32 arithmetic of one layer against transformers or diffusers on the same inputs.
FLOAT32_LAYER = 1e-5
# Oracle values that are printed with six or seven digits.
PRINTED = 1e-6
# bfloat16 keeps 8 bits of every factor, 2^-9 of rounding each; a few layers or a contractive loop
# of them, relative to the largest output.
BF16_LAYER = 2e-2
# Logits of a bundle against the float32 checkpoint's, relative to the largest logit. fp32: a
# trained loop is not contractive and amplifies the last bits of single rows, 1e-3 has been seen.
# fp16 and bf16: one rounding of every weight, 2^-12 and 2^-9, through encoder and loop.
BUILT = {"fp32": 1e-3, "fp16": 4e-3, "bf16": 5e-2}
# Mean and variance of 20,000 standard normals: 5 standard errors are 0.035 and 0.05.
SAMPLE_MOMENT = 0.05
# The noise, absolute, on |z| < 5.8: log, sin and cos may differ by a few units in the last place.
LIBM = 1e-12
# Statistics of the noise stay within this many standard errors; its draws are fixed, so no flakes.
SIGMAS = 5.0
# Grey levels: releases of LittleCMS, which converts LAB, round differently.
COLOUR_ENGINE = 1
# float32 twice over: statistics or losses of a hundred rows, resampled pixels, a trained loop of 10
# steps in two batch sizes.
FLOAT32_TWICE = 1e-4
# A chain of 1,000 steps with the exact predictor, against its continuous limit: order 1 / T.
CHAIN_MEAN, CHAIN_VARIANCE = 1e-3, 1e-2
# Fitted order of convergence over 20 to 320 steps: the next order still shows at the coarse end.
FIRST_ORDER, SECOND_ORDER = (0.8, 1.2), (1.8, 2.3)
# A layer of the packed loop against float64 on the same rounded operands: float32 sums, of order 1,
# of up to 1,024 products in 16 parts.
TWIN_LAYER = 2e-6
# Seven steps of it, relative to the largest value: an activation next to a tie may round the other
# way, which moves it by 2^-10 (fp16) or 2^-7 (bf16), times a weight of order 0.1.
TWIN_LOOP = {"fp16": 1e-3, "bf16": 5e-3}
# One layer of the persistent kernel on a GPU, relative to the largest value: it cuts the sum of an
# mma, by up to 2^-23 of its largest term, where the twin rounds it; there are 16 to 64 such sums.
PERSISTENT_LAYER = 1e-5
# The persistent kernel on a GPU against the twin, a few steps, relative to the largest value: as
# above, and an activation next to a tie may then round the other way.
PERSISTENT = {"fp16": 2e-3, "bf16": 1e-2}
# Three products of 16 in float32, sums below 32, absolute: a GPU cuts off each sum at 2^-23 of its
# largest part.
MMA_SUM = 3e-5
# int8: 2^-8 of the range of every factor, through encoder and a trained loop; relative to the
# largest logit.
INT8 = 0.1
# A chain of 20 steps with the persistent kernel, which adds in float32, against operators that
# round every product to the type, 2^-11 (fp16) or 2^-8 (bf16) of it; relative to the largest
# output.
CAPTURED_LOOP = {"fp16": 5e-3, "bf16": 4e-2}
# A bound of a bootstrap interval, relative to the interval's width: the deviation of 2,000
# resamples has a standard error of 1.6 %, a bound half of that; five of them.
BOOTSTRAP = 0.04
# Share of 300 simulated sets whose interval holds the truth: four standard errors of 95 % are 5 %.
COVERED = 0.05
# Damage to a picture at 80 and at 2,000 pixels, grey levels: most from the weakest blur, a third of
# a pixel at 80, which Pillow's boxes only approach; from JPEG, 1.5, and from clipped noise, 1.3.
SIZES_ALIKE = 3.0
# Share of an image that a rectangle covers: half a pixel at each of the edges, in 300 x 200.
PIXEL_EDGES = 0.01
# EfficientNet-Lite0's last map, whose values go up to 6, against the same network written out: the
# same sums, which another library might add in another order (float32); the sigmoid of 30 is 1e-13
# from 1, in 16 blocks (float64).
LITE0 = {"float32": 1e-4, "float64": 1e-9}
# The native loop in int8 behind float32 products against its twin, relative to the largest value:
# the last bits of the condition differ, and an activation next to a tie takes the other level, 1 in
# 255 of the range of its row, times a weight of order 0.1.
NATIVE_LEVEL = 2e-2
# Measures of alignment of a dozen float64 vectors, rotated and scaled by up to 100: distances are
# differences of squares of up to 1e5, which keep 11 digits.
SIMILAR = 1e-7
# Branches of timm merged into one layer in float64, some of which timm keeps in float32, and then
# all of an encoder of up to 60 layers in float32; relative to the largest value of the vector.
TIMM_MERGED = 1e-4
# A photograph decoded at a smaller scale and then resized, against the same decoded whole, in grey
# levels: the resampling filter sees other pixels at edges. Mean, and largest of all pixels.
FAST_DECODE_MEAN, FAST_DECODE_LARGEST = 2.0, 40
# Share of 20,000 chains that end in a class, against that of 200,000 others: one standard error is
# 0.0034 at a share of 0.7.
CLASS_SHARE = 0.015
# A chain of at most five steps in float64 against the same with one term more in its state, which
# cancels; values are of order 1, absolute.
SHIFTED = 1e-14
