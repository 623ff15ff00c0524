/* --budget: from "20%", "12-experts" or "2GiB" to a number of slots. */
#ifndef SIDA_RUNTIME_ENGINE_BUDGET_H
#define SIDA_RUNTIME_ENGINE_BUDGET_H

#include "formats/base/status.h"

#include <stddef.h>
#include <stdint.h>

typedef enum sida_budget_kind {
    SIDA_BUDGET_SHARE,   /* slots for that share of all experts of the model, rounded down */
    SIDA_BUDGET_EXPERTS, /* so many slots */
    SIDA_BUDGET_BYTES    /* caps all that is on the device: slots = (cap - fixed) / slot bytes, with
                          * what driver and libraries take in the fixed part */
} sida_budget_kind;

typedef struct sida_budget {
    sida_budget_kind kind;
    double share;    /* 0 … 1 */
    int64_t experts; /* >= 1 */
    uint64_t bytes;
} sida_budget;

/* What stands against the budget. Everything but slots is fixed. */
typedef struct sida_budget_needs {
    int64_t experts;   /* of the whole model */
    size_t slot_bytes; /* a slot */
    size_t dense_bytes, workspace_bytes, predictor_bytes;
    size_t driver_bytes; /* driver and libraries; counts where the budget is a size */
} sida_budget_needs;

/* Set aside beside what driver and libraries have when that is measured, for what they take later:
 * kernels are loaded when they first run, graphs are made, allocations are rounded up. */
enum { SIDA_BUDGET_DRIVER_RESERVE_BYTES = 64 << 20 };

/* ARGUMENT for anything else. */
sida_status sida_budget_parse(sida_budget *out, const char *text);

/* Slots (2 … experts) and the device cap that goes with them: the size itself, or fixed + slots
 * without what the driver takes. BUDGET with the arithmetic below 2 slots. */
sida_status sida_budget_slots(int32_t *slots, size_t *cap_bytes, const sida_budget *budget,
                              const sida_budget_needs *needs);

#endif
