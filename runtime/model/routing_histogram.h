/* Made by tools/reference/routing_histogram.py: shares of top-1 choices by rank, mean over
 * 5 MoE layers of the bundled sample over data/sample/inputs/prose-test.txt:
 * 9993 encoder tokens, 652 decoder tokens. */
#ifndef SIDA_RUNTIME_MODEL_ROUTING_HISTOGRAM_H
#define SIDA_RUNTIME_MODEL_ROUTING_HISTOGRAM_H

enum { SIDA_ROUTING_RANKS = 64 };

/* clang-format off */
static const double sida_routing_shares[SIDA_ROUTING_RANKS] = {
    0.110292, 0.084686, 0.077577, 0.059138, 0.045067, 0.036038, 0.033443, 0.032109,
    0.026661, 0.023586, 0.021559, 0.019411, 0.018851, 0.018284, 0.017697, 0.017337,
    0.016423, 0.015876, 0.015182, 0.015002, 0.014556, 0.014255, 0.013768, 0.013342,
    0.012494, 0.011968, 0.011080, 0.010960, 0.010720, 0.010113, 0.009526, 0.009186,
    0.008986, 0.008686, 0.008385, 0.007959, 0.007678, 0.007538, 0.007478, 0.006951,
    0.006871, 0.006284, 0.006204, 0.005904, 0.005824, 0.005544, 0.005164, 0.004843,
    0.004463, 0.004383, 0.004183, 0.004063, 0.003903, 0.003763, 0.003442, 0.003162,
    0.003002, 0.002882, 0.001961, 0.001721, 0.001261, 0.000600, 0.000520, 0.000200,
};
/* clang-format on */

#endif
