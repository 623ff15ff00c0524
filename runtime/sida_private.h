/* An engine from inside: what sida.c opens and sida_job.c runs. */
#ifndef SIDA_RUNTIME_SIDA_PRIVATE_H
#define SIDA_RUNTIME_SIDA_PRIVATE_H

#include "formats/tokenizer.h"
#include "runtime/engine/budget.h"
#include "runtime/engine/pass.h"
#include "runtime/sida.h"

struct sida_engine {
    sida_backend *backend;
    sida_model *model;
    sida_run *run;
    sida_resident *resident; /* NULL: experts come through slots */
    sida_tokenizer *tokenizer;
    sida_hash_source *source;
    const sida_policy *policy;
    sida_routing routing;
    int32_t most_allowed;        /* guided; 0: no limit */
    sida_engine_options options; /* its strings are not kept */
    sida_budget budget;
    sida_budget_needs needs;
    sida_engine_facts facts;
};

/* ARGUMENT, naming the option, for a value outside low … high. */
sida_status sida_engine_check_number(const char *name, int64_t value, int64_t low, int64_t high);
/* Before a job: under a size, fewer slots when the libraries have taken more than was set aside. */
sida_status sida_engine_divide_again(sida_engine *engine);

#endif
