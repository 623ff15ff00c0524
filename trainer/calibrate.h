/* Temperatures, so that a network's α is as sure as the router's factors are. */
#ifndef SIDA_TRAINER_CALIBRATE_H
#define SIDA_TRAINER_CALIBRATE_H

#include "runtime/predictor/net.h"
#include "trainer/dataset.h"

#include <jansson.h>

/* For each MoE layer the temperature T, 2^(i / 16) in 1/4 … 4, at which softmax(scores / T) is
 * nearest to the factors that `data` applied: in the mean distance at the router's best, as
 * sida_evaluate() has it (content tokens that were not dropped; shares of the chosen experts where
 * the model renormalises). Divides the layer's rows of heads.weight and heads.bias by T. As 1 is
 * among them, that distance does not grow; the order of experts stays, but for ties in rounding.
 * temperatures: [layers of the encoder + of the decoder], 1 where no token tells. The net is of the
 * data's model and sizes. The same bytes for any number of threads. Guo et al. 2017
 * (arXiv 1706.04599), with our distance in the place of the likelihood. */
sida_status sida_calibrate(double *temperatures, sida_net *net, const sida_dataset *data);

/* {"encoder": [T, …], "decoder": [T, …]}; a side without layers is left out. */
json_t *sida_temperatures_to_json(const double *temperatures, const int32_t layers[2]);

#endif
