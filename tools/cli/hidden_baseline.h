/* The baseline for a refinement that learns nothing: the model's own routers on the residual stream
 * behind a layer, before the blocks between have added to it. */
#ifndef SIDA_TOOLS_CLI_HIDDEN_BASELINE_H
#define SIDA_TOOLS_CLI_HIDDEN_BASELINE_H

#include "runtime/predictor/hash_source.h"
#include "trainer/dataset.h"

/* A source that refines: it runs the model over the batches that it is asked for (the encoder's
 * input; the decoder in one call a batch), and the refinement behind layer l is router_m(norm_m(h))
 * for each layer m > l, h what the model had behind layer l. Up front it says what
 * sida_router_baseline() does. For one thread.
 *
 * folder, errors: as sida_router_baseline() has them, and those of opening the model on `device`
 * with all its experts there. The data is borrowed: it says how long sequences are, and the
 * routing that refinements are given is compared with the model's. */
sida_status sida_hidden_baseline(sida_hash_source **out, const char *folder, const char *device,
                                 const sida_dataset *data);

/* Of all refinements so far: MISMATCH where the model chose, for over 1 in 100 tokens and layers,
 * otherwise than they were told, as then the trace is not of this model. */
sida_status sida_hidden_baseline_check(const sida_hash_source *source, const char *folder);

#endif
