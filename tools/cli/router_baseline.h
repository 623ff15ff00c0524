/* The baseline that learns nothing: the model's own routers on the input embedding. */
#ifndef SIDA_TOOLS_CLI_ROUTER_BASELINE_H
#define SIDA_TOOLS_CLI_ROUTER_BASELINE_H

#include "runtime/predictor/hash_source.h"
#include "trainer/dataset.h"

/* Reads the routers and their norms of a model directory. The embedding is the trace's, borrowed.
 * MISMATCH when the trace is not of that model; else the errors of opening a model. */
sida_status sida_router_baseline(sida_hash_source **out, const char *folder,
                                 const sida_dataset *data);

#endif
