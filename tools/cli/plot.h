/* Pictures by gnuplot. */
#ifndef SIDA_TOOLS_CLI_PLOT_H
#define SIDA_TOOLS_CLI_PLOT_H

#include "formats/base/status.h"

#include <jansson.h>

/* Before the work: ARGUMENT unless `path` ends in .svg, IO where it could not be written,
 * UNSUPPORTED where there is no gnuplot. */
sida_status sida_plot_check(const char *path);
/* Hit rates of every MoE layer, a group of bars for each. names: [count]; figures: what
 * sida_evaluation_to_json() gives, [count]. PATH appears complete or not at all. */
sida_status sida_plot_layers(const char *path, const char *const *names, json_t *const *figures,
                             int32_t count);
/* Loss and validation hit@1 of each epoch, from a network's P.h5, and below them the layers' hit
 * rates of the epoch kept. */
sida_status sida_plot_training(const char *path, const char *predictor, const json_t *figures);

#endif
