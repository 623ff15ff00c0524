/* A trained network for other software. */
#ifndef SIDA_RUNTIME_PREDICTOR_EXPORT_H
#define SIDA_RUNTIME_PREDICTOR_EXPORT_H

#include "formats/base/status.h"

/* Writes the network of P.h5 as safetensors: the tensors of net.h and, where there is a refinement,
 * of refine.h under their names, in F32, and the meta data that formats/README.md lists.
 * UNSUPPORTED for a source without a network; else the errors of reading P.h5 and of writing. */
sida_status sida_predictor_export(const char *path, const char *predictor);

#endif
