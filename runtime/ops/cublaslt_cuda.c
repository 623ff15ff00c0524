#include "runtime/ops/cublaslt_cuda.h"

#include "formats/base/memory.h"
#include "runtime/backend/backend_cuda.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

/* ALIGNED: what vector loads and TMA want of addresses, rows and strides. */
enum { PLANS = 4096, PROBES = 8, LEAST_ROWS = 64, STEPS_PER_OCTAVE = 16, ALIGNED = 16 };

/* --- kinds of products */

enum {
    TRANSPOSE_A = 1 << 0,
    TRANSPOSE_B = 1 << 1,
    TF32 = 1 << 2,
    BIAS = 1 << 3,
    RELU = 1 << 4,
    A_ALIGNED = 1 << 5,
    B_ALIGNED = 1 << 6,
    C_ALIGNED = 1 << 7,
    BIAS_ALIGNED = 1 << 8
};

/* Row-major, as the call. Compared as bytes: there is no padding. */
typedef struct product_key {
    int64_t m, n, k, lda, ldb, ldc;
    uint64_t workspace_bytes;
    int32_t count;
    uint32_t flags;
} product_key;
_Static_assert(sizeof(product_key) == 8 * sizeof(uint64_t), "no padding");

enum plan_state { PLAN_EMPTY, PLAN_NONE, PLAN_FOUND };
typedef struct plan {
    product_key key;
    cublasLtMatmulAlgo_t algo;
    enum plan_state state;
} plan;

/* A plan depends on its key alone, so it may be forgotten: a full neighbourhood loses one. */
struct sida_lt_plans {
    plan plans[PLANS];
};

void sida_lt_plans_destroy(sida_lt_plans *plans) {
    free(plans);
}

/* x rounded up to one of STEPS_PER_OCTAVE sizes between two powers of 2. */
static int64_t bucket(int64_t x, int64_t least) {
    if (x <= least) return least;
    const int64_t power = (int64_t)1 << (63 - __builtin_clzll((unsigned long long)x));
    const int64_t step = power > STEPS_PER_OCTAVE ? power / STEPS_PER_OCTAVE : 1;
    return (x + step - 1) / step * step;
}

/* The size that the rows of a batch give is rounded up, so that a few plans do for all batches. It
 * never lies along a row, where kernels that load several elements at a time want multiples. */
static product_key rounded(product_key key) {
    if (!(key.flags & TRANSPOSE_A))
        key.m = bucket(key.m, LEAST_ROWS);
    else if (!(key.flags & TRANSPOSE_B))
        key.k = bucket(key.k, LEAST_ROWS);
    key.count = (int32_t)bucket(key.count, 1);
    return key;
}

static bool aligned(const float *data, int64_t ld, int64_t stride, int32_t count) {
    const int64_t floats = ALIGNED / (int64_t)sizeof *data;
    return (uintptr_t)data % ALIGNED == 0 && ld % floats == 0 &&
           (count == 1 || stride % floats == 0);
}

static product_key key_of(const sida_gemm_batch *batch, bool tf32, size_t workspace_bytes) {
    const sida_gemm_call *q = &batch->first;
    product_key key = {.m = q->m,
                       .n = q->n,
                       .k = q->k,
                       .lda = q->lda,
                       .ldb = q->ldb,
                       .ldc = q->ldc,
                       .workspace_bytes = workspace_bytes,
                       .count = batch->count};
    if (q->transpose_a) key.flags |= TRANSPOSE_A;
    if (q->transpose_b) key.flags |= TRANSPOSE_B;
    if (tf32) key.flags |= TF32;
    if (batch->relu) key.flags |= RELU;
    if (aligned(q->a, q->lda, batch->a_stride, batch->count)) key.flags |= A_ALIGNED;
    if (aligned(q->b, q->ldb, batch->b_stride, batch->count)) key.flags |= B_ALIGNED;
    if (aligned(q->c, q->ldc, batch->c_stride, batch->count)) key.flags |= C_ALIGNED;
    if (!batch->bias) return key;
    key.flags |= BIAS;
    if ((uintptr_t)batch->bias % ALIGNED == 0) key.flags |= BIAS_ALIGNED;
    return key;
}

/* --- descriptions of them for cublasLt */

/* Row-major c = op(a) op(b) is column-major cᵀ = op(b)ᵀ op(a)ᵀ: the left factor is b. */
typedef struct description {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t left, right, c;
} description;

static bool describe_matrix(const sida_cublas_lt *lt, cublasLtMatrixLayoutOpaque_t *layout,
                            int64_t rows, int64_t cols, int64_t ld, int32_t count, int64_t stride) {
    if (lt->layout_init(layout, sizeof *layout, CUDA_R_32F, (uint64_t)rows, (uint64_t)cols, ld))
        return false;
    if (count == 1) return true;
    return !lt->layout_set(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count) &&
           !lt->layout_set(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                           sizeof stride);
}

static bool describe(const sida_cublas_lt *lt, description *d, const product_key *key,
                     int64_t a_stride, int64_t b_stride, int64_t c_stride, const void *bias) {
    const bool ta = key->flags & TRANSPOSE_A, tb = key->flags & TRANSPOSE_B;
    const int32_t left = tb ? CUBLAS_OP_T : CUBLAS_OP_N, right = ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    if (key->flags & BIAS)
        epilogue = key->flags & RELU ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
    else if (key->flags & RELU)
        epilogue = CUBLASLT_EPILOGUE_RELU;
    if (lt->product_init(&d->product, sizeof d->product,
                         key->flags & TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
                         CUDA_R_32F) ||
        lt->product_set(&d->product, CUBLASLT_MATMUL_DESC_TRANSA, &left, sizeof left) ||
        lt->product_set(&d->product, CUBLASLT_MATMUL_DESC_TRANSB, &right, sizeof right))
        return false;
    if (epilogue != CUBLASLT_EPILOGUE_DEFAULT &&
        lt->product_set(&d->product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue))
        return false;
    if (key->flags & BIAS &&
        lt->product_set(&d->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias))
        return false;
    return describe_matrix(lt, &d->left, tb ? key->k : key->n, tb ? key->n : key->k, key->ldb,
                           key->count, b_stride) &&
           describe_matrix(lt, &d->right, ta ? key->m : key->k, ta ? key->k : key->m, key->lda,
                           key->count, a_stride) &&
           describe_matrix(lt, &d->c, key->n, key->m, key->ldc, key->count, c_stride);
}

/* --- the choice */

/* A stride that promises what the key does: matrices of `rows` rows end to end, or odd. */
static int64_t stride_of(const product_key *key, uint32_t aligned_flag, int64_t rows, int64_t ld) {
    return key->flags & aligned_flag ? rows * ld : (rows * ld) | 1;
}

static bool prefer(const sida_cublas_lt *lt, cublasLtMatmulPreferenceOpaque_t *preference,
                   const product_key *key) {
    const uint32_t least = sizeof(float);
    const uint32_t of_a = key->flags & A_ALIGNED ? ALIGNED : least;
    const uint32_t of_b = key->flags & B_ALIGNED ? ALIGNED : least;
    const uint32_t of_c = key->flags & C_ALIGNED ? ALIGNED : least;
    return !lt->preference_init(preference, sizeof *preference) &&
           !lt->preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                               &key->workspace_bytes, sizeof key->workspace_bytes) &&
           !lt->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &of_b,
                               sizeof of_b) &&
           !lt->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &of_a,
                               sizeof of_a) &&
           !lt->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &of_c,
                               sizeof of_c) &&
           !lt->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &of_c,
                               sizeof of_c);
}

/* Of the key alone: the bias is an address that is aligned as the key says and never read. */
static void choose(const sida_lt_place *place, plan *p) {
    const sida_cublas_lt *lt = place->cublas->lt;
    const product_key *key = &p->key;
    const uintptr_t bias = 256 + (key->flags & BIAS_ALIGNED ? ALIGNED : sizeof(float));
    description d;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t result = {0};
    int found = 0;
    p->state = PLAN_NONE;
    if (!describe(lt, &d, key,
                  stride_of(key, A_ALIGNED, key->flags & TRANSPOSE_A ? key->k : key->m, key->lda),
                  stride_of(key, B_ALIGNED, key->flags & TRANSPOSE_B ? key->n : key->k, key->ldb),
                  stride_of(key, C_ALIGNED, key->m, key->ldc), (const void *)bias) ||
        !prefer(lt, &preference, key))
        return;
    if (lt->heuristic(place->handle, &d.product, &d.left, &d.right, &d.c, &d.c, &preference, 1,
                      &result, &found) ||
        found < 1 || result.state != CUBLAS_STATUS_SUCCESS ||
        result.workspaceSize > key->workspace_bytes)
        return;
    p->algo = result.algo;
    p->state = PLAN_FOUND;
}

static uint64_t hash_of(const product_key *key) {
    uint64_t words[sizeof *key / sizeof(uint64_t)], hash = 0;
    memcpy(words, key, sizeof words);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
    }
    return hash;
}

static const plan *plan_of(const sida_lt_place *place, const product_key *key) {
    sida_lt_plans *plans = *place->plans;
    const uint64_t hash = hash_of(key);
    plan *p = NULL;
    for (uint64_t i = 0; i < PROBES; i++) {
        p = &plans->plans[(hash + i) % PLANS];
        if (p->state == PLAN_EMPTY) break;
        if (memcmp(&p->key, key, sizeof *key) == 0) return p;
        if (i + 1 == PROBES) p = &plans->plans[(hash + (hash >> 32) % PROBES) % PLANS];
    }
    p->key = *key;
    choose(place, p);
    return p;
}

/* --- a product */

/* Before anything was issued. */
static bool refused(cublasStatus_t code) {
    return code == CUBLAS_STATUS_NOT_SUPPORTED || code == CUBLAS_STATUS_INVALID_VALUE ||
           code == CUBLAS_STATUS_ARCH_MISMATCH;
}

sida_status sida_lt_multiply(sida_stream *stream, const sida_gemm_batch *batch, bool tf32,
                             bool *done) {
    sida_status status = SIDA_OK;
    const sida_gemm_call *q = &batch->first;
    sida_lt_place place;
    const float one = 1.0f, beta = q->add ? 1.0f : 0.0f;
    description d;
    *done = false;
    SIDA_TRY(sida_lt_place_of(stream, &place));
    const sida_cublas_lt *lt = place.cublas->lt;
    if (!lt) goto out;
    if (!*place.plans) SIDA_TRY(SIDA_ALLOC(place.plans, 1, "plans of products"));
    const product_key exact = key_of(batch, tf32, place.workspace_bytes), most = rounded(exact);
    if (!describe(lt, &d, &exact, batch->a_stride, batch->b_stride, batch->c_stride, batch->bias))
        goto out;
    /* A kernel chosen for the larger size that does not take this one: what this one's is. */
    const int tries = memcmp(&exact, &most, sizeof exact) == 0 ? 1 : 2;
    for (int i = 0; i < tries; i++) {
        const plan *p = plan_of(&place, i == 0 ? &most : &exact);
        if (p->state != PLAN_FOUND) continue;
        const cublasStatus_t code = lt->multiply(
            place.handle, &d.product, &one, q->b, &d.left, q->a, &d.right, &beta, q->c, &d.c, q->c,
            &d.c, &p->algo, place.workspace, place.workspace_bytes, place.stream);
        if (refused(code)) {
            (void)cudaGetLastError();
            continue;
        }
        SIDA_TRY(sida_cublas_check(place.cublas, code, "cublasLtMatmul"));
        *done = true;
        break;
    }
out:
    return status;
}
