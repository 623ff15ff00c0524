/* What is wrong with a trace: reads all of it and goes on after a problem. A kind of problem in a
 * dataset is told once, with its first place and how often it is there. */
#include "formats/base/memory.h"
#include "formats/trace_inside.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { UNKNOWN = -1, BLOCK_BYTES = 1 << 20 };
/* fp16 keeps log-probabilities to one part in 2048, which moves the sum of a softmax over 65,536
 * experts by less than 0.3 %. */
static const double most_sum = 1.005;
static const float most_logp = 1e-3f;

typedef struct check {
    sida_h5_file *file;
    sida_trace_report report;
    void *context;
    bool is_part;
    /* Attributes and extents; UNKNOWN where they are missing or out of range. */
    int64_t experts, top_k, top, d_model, vocabulary, layers[2], sequences;
    uint8_t *occurs; /* [vocabulary]: 1, the id is a token */
    uint32_t *stamps, stamp;
} check;

__attribute__((format(printf, 2, 3))) static void tell(const check *c, const char *format, ...) {
    char line[SIDA_TRACE_LINE];
    int at = snprintf(line, sizeof line, "%.255s: ", sida_h5_path(c->file));
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line + at, sizeof line - (size_t)at, format, arguments);
    va_end(arguments);
    c->report(c->context, line);
}

/* For what the layer below has said already. */
static void tell_last(const check *c) {
    c->report(c->context, sida_last_message());
}

/* One kind of problem in one dataset. */
typedef struct tally {
    int64_t count, first;
    char value[32]; /* the first's, where it says something */
} tally;

static void add(tally *t, int64_t at) {
    if (t->count++ == 0) t->first = at;
}

static void add_value(tally *t, int64_t at, int64_t value) {
    if (t->count == 0) snprintf(t->value, sizeof t->value, ", %" PRId64, value);
    add(t, at);
}

/* "encoder/alpha: token 3, MoE layer 1: WHAT (and 7 more)". layers: cells a row, 0: none. */
static void tell_tally(const check *c, const tally *t, const char *path, const char *row,
                       int64_t layers, const char *what) {
    char place[64], more[48] = "";
    if (t->count == 0) return;
    if (layers > 0)
        snprintf(place, sizeof place, "%s %" PRId64 ", MoE layer %" PRId64, row, t->first / layers,
                 t->first % layers);
    else
        snprintf(place, sizeof place, "%s %" PRId64, row, t->first);
    if (t->count > 1) snprintf(more, sizeof more, " (and %" PRId64 " more)", t->count - 1);
    tell(c, "%s: %s: %s%s%s", path, place, what, t->value, more);
}

/* --- attributes */

static void check_text(const check *c, const char *name) {
    char *text;
    if (sida_h5_get_text(c->file, name, &text) != SIDA_OK)
        tell_last(c);
    else
        free(text);
}

static void check_fingerprint(const check *c, const char *name) {
    char *text;
    sida_fingerprint value;
    if (sida_h5_get_text(c->file, name, &text) != SIDA_OK) {
        tell_last(c);
        return;
    }
    if (!sida_fingerprint_parse(&value, text))
        tell(c, "attribute %s is '%.40s', not 32 hexadecimal digits", name, text);
    free(text);
}

static int64_t check_number(const check *c, const char *name, int64_t low, int64_t high) {
    int64_t value;
    if (sida_h5_get_i64(c->file, name, &value) != SIDA_OK) {
        tell_last(c);
        return UNKNOWN;
    }
    if (value >= low && value <= high) return value;
    tell(c, "attribute %s is %" PRId64 ", not %" PRId64 " to %" PRId64, name, value, low, high);
    return UNKNOWN;
}

/* False when the rest would not be worth reading. */
static bool check_attributes(check *c) {
    char *format = NULL;
    bool foreign = false;
    if (sida_h5_get_text(c->file, "format", &format) != SIDA_OK)
        tell_last(c);
    else if ((foreign = strcmp(format, SIDA_TRACE_FORMAT) != 0))
        tell(c, "attribute format is '%.40s', not '%s'", format, SIDA_TRACE_FORMAT);
    free(format);
    if (foreign) return false;
    check_number(c, "version", SIDA_TRACE_VERSION, SIDA_TRACE_VERSION);
    static const char *const fingerprints[] = {"model", "tokenizer", "input"}, *const texts[] = {
                                                                                   "config",
                                                                                   "options",
                                                                                   "family"};
    for (size_t i = 0; i < 3; i++) check_fingerprint(c, fingerprints[i]);
    for (size_t i = 0; i < 3; i++) check_text(c, texts[i]);
    c->experts = check_number(c, "experts", 1, UINT16_MAX + 1);
    c->top_k = check_number(c, "top_k", 1, UINT16_MAX + 1);
    c->top = check_number(c, "top", 1, UINT16_MAX + 1);
    c->d_model = check_number(c, "d_model", 1, SIDA_TRACE_MOST_D_MODEL);
    c->vocabulary = check_number(c, "vocabulary", 1, SIDA_TRACE_MOST_VOCABULARY);
    c->layers[0] = check_number(c, "layers_encoder", 0, SIDA_TRACE_MOST_LAYERS);
    c->layers[1] = check_number(c, "layers_decoder", 0, SIDA_TRACE_MOST_LAYERS);
    if (c->top_k > 0 && c->top > 0 && c->top < c->top_k)
        tell(c, "attribute top is %" PRId64 ", fewer than top_k, %" PRId64, c->top, c->top_k);
    const struct {
        const char *name;
        int64_t value;
    } below[] = {{"top", c->top}, {"top_k", c->top_k}};
    for (size_t i = 0; i < 2; i++)
        if (c->experts > 0 && below[i].value > c->experts)
            tell(c, "attribute %s is %" PRId64 ", more than experts, %" PRId64, below[i].name,
                 below[i].value, c->experts);
    if (c->layers[0] == 0 && c->layers[1] == 0) tell(c, "layers_encoder and layers_decoder are 0");
    if (c->layers[0] + c->layers[1] > SIDA_TRACE_MOST_LAYERS)
        tell(c, "layers_encoder and layers_decoder are more than %d", SIDA_TRACE_MOST_LAYERS);
    return true;
}

/* --- extents */

/* What an axis has to be, and why. */
typedef struct axis {
    int64_t extent; /* UNKNOWN: anything */
    const char *why;
} axis;

/* Whether a dataset is there, of a type that converts to `type`, and of that shape. */
static bool check_shape(const check *c, const char *path, sida_h5_type type, int rank,
                        const axis *axes, int64_t *shape) {
    bool sound = true;
    if (sida_h5_shape(c->file, path, type, rank, shape) != SIDA_OK) {
        tell_last(c);
        return false;
    }
    for (int i = 0; i < rank; i++)
        if (axes[i].extent != UNKNOWN && shape[i] != axes[i].extent) {
            tell(c, "dataset %s has extent %" PRId64 " on axis %d, but %s is %" PRId64, path,
                 shape[i], i, axes[i].why, axes[i].extent);
            sound = false;
        }
    return sound;
}

/* --- contents */

typedef struct scan scan;

/* A dataset, and what may be wrong in it. */
typedef struct column {
    const char *path;
    sida_h5_type type;
    const char *row; /* what a row is called */
    bool layered;    /* a row has a cell a MoE layer */
    void (*visit)(scan *s);
    const char *words[4]; /* of scan.tallies */
} column;

/* A block of a column's rows. */
struct scan {
    check *c;
    int64_t cells, width; /* a row has cells of `width` values */
    int64_t first, rows;
    const void *data;
    int64_t before; /* the visitor's own, from block to block */
    tally tallies[4];
};

/* Reads all of a column, and tells what its visitor found. */
static sida_status check_values(check *c, const column *col, int64_t rows, int64_t cells,
                                int64_t width) {
    scan s = {.c = c, .cells = cells, .width = width};
    sida_status status = SIDA_OK;
    size_t row;
    uint8_t *data = NULL;
    if (cells == 0 || width == 0) return SIDA_OK;
    if (sida_mul_overflow((size_t)cells, (size_t)width, &row) ||
        sida_mul_overflow(row, sida_h5_type_bytes(col->type), &row))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: too large for memory", sida_h5_path(c->file));
    int64_t block = row >= BLOCK_BYTES ? 1 : (int64_t)(BLOCK_BYTES / row);
    if (block > rows) block = rows;
    SIDA_TRY(SIDA_ALLOC(&data, row * (size_t)block, "a trace's rows"));
    s.data = data;
    for (s.first = 0; s.first < rows; s.first += block) {
        s.rows = rows - s.first < block ? rows - s.first : block;
        if (sida_h5_read_rows(c->file, col->path, col->type, s.first, s.rows, data) != SIDA_OK) {
            tell_last(c);
            goto out;
        }
        col->visit(&s);
    }
    for (int i = 0; i < 4 && col->words[i]; i++)
        tell_tally(c, &s.tallies[i], col->path, col->row, col->layered ? cells : 0, col->words[i]);
out:
    free(data);
    return status;
}

static void visit_tokens(scan *s) {
    const int32_t *ids = s->data;
    for (int64_t i = 0; i < s->rows; i++) {
        if (ids[i] < 0 || (s->c->vocabulary > 0 && ids[i] >= s->c->vocabulary))
            add_value(&s->tallies[0], s->first + i, ids[i]);
        else if (s->c->occurs)
            s->c->occurs[ids[i]] = 1;
    }
}

/* Ids below E, and none twice in a cell. */
static void visit_experts(scan *s) {
    check *c = s->c;
    const uint16_t *ids = s->data;
    for (int64_t cell = 0; cell < s->rows * s->cells; cell++) {
        int64_t at = s->first * s->cells + cell;
        if (++c->stamp == 0) {
            memset(c->stamps, 0, (UINT16_MAX + 1) * sizeof *c->stamps);
            c->stamp = 1;
        }
        for (int64_t i = 0; i < s->width; i++) {
            uint16_t id = ids[cell * s->width + i];
            if (c->experts > 0 && id >= c->experts) add_value(&s->tallies[0], at, id);
            if (c->stamps[id] == c->stamp) add_value(&s->tallies[1], at, id);
            c->stamps[id] = c->stamp;
        }
    }
}

static void visit_floats(scan *s) {
    const float *values = s->data;
    for (int64_t i = 0; i < s->rows * s->cells * s->width; i++) {
        int64_t at = s->first * s->cells + i / s->width;
        if (!isfinite(values[i]))
            add(&s->tallies[0], at);
        else if (values[i] < 0)
            add(&s->tallies[1], at);
    }
}

static void visit_flags(scan *s) {
    const uint8_t *flags = s->data;
    for (int64_t i = 0; i < s->rows * s->cells; i++)
        if (flags[i] > 1) add(&s->tallies[0], s->first * s->cells + i);
}

static void visit_logp(scan *s) {
    const uint16_t *bits = s->data;
    for (int64_t cell = 0; cell < s->rows * s->cells; cell++) {
        int64_t at = s->first * s->cells + cell;
        bool infinite = false, above = false, rises = false;
        float before = INFINITY;
        double sum = 0;
        for (int64_t i = 0; i < s->width; i++) {
            float value = sida_f16_to_f32(bits[cell * s->width + i]);
            if (!isfinite(value)) {
                infinite = true;
                continue;
            }
            above |= value > most_logp;
            rises |= value > before;
            before = value;
            sum += exp((double)value);
        }
        if (infinite) add(&s->tallies[0], at);
        if (above) add(&s->tallies[1], at);
        if (rises) add(&s->tallies[2], at);
        if (!above && sum > most_sum) add(&s->tallies[3], at);
    }
}

static void visit_lines(scan *s) {
    const int64_t *lines = s->data;
    for (int64_t i = 0; i < s->rows; i++)
        if (lines[i] < 1) add_value(&s->tallies[0], s->first + i, lines[i]);
}

static void visit_labels(scan *s) {
    const int32_t *labels = s->data;
    for (int64_t i = 0; i < s->rows; i++)
        if (labels[i] < -1) add_value(&s->tallies[0], s->first + i, labels[i]);
}

static void visit_embedding_ids(scan *s) {
    const int32_t *ids = s->data;
    for (int64_t i = 0; i < s->rows; i++) {
        if (ids[i] < 0 || (s->c->vocabulary > 0 && ids[i] >= s->c->vocabulary))
            add_value(&s->tallies[0], s->first + i, ids[i]);
        else if (s->c->occurs)
            s->c->occurs[ids[i]] = 0; /* what stays 1 has no row */
        if (s->first + i > 0 && ids[i] <= s->before)
            add_value(&s->tallies[1], s->first + i, ids[i]);
        s->before = ids[i];
    }
}

#define ID_OUTSIDE "an id outside the vocabulary"
#define NO_FLAG "a flag that is neither 0 nor 1"

/* [S + 1] offsets that rise from 0 to `tokens` (UNKNOWN: to anything). */
static sida_status check_offsets(const check *c, const char *path, int64_t tokens) {
    sida_status status = SIDA_OK;
    int64_t count, *offsets = NULL;
    tally falls = {0};
    const axis want = {c->sequences == UNKNOWN ? UNKNOWN : c->sequences + 1,
                       "the number of sequences + 1"};
    if (!check_shape(c, path, SIDA_H5_I64, 1, &want, &count)) return SIDA_OK;
    if (count == 0) {
        tell(c, "%s: is empty", path);
        return SIDA_OK;
    }
    SIDA_TRY(SIDA_ALLOC(&offsets, count, path));
    if (sida_h5_read_rows(c->file, path, SIDA_H5_I64, 0, count, offsets) != SIDA_OK) {
        tell_last(c);
        goto out;
    }
    if (offsets[0] != 0) tell(c, "%s: starts at %" PRId64 ", not at 0", path, offsets[0]);
    for (int64_t s = 1; s < count; s++)
        if (offsets[s] < offsets[s - 1]) add(&falls, s - 1);
    tell_tally(c, &falls, path, "sequence", 0, "ends before it begins");
    if (tokens != UNKNOWN && offsets[count - 1] != tokens)
        tell(c, "%s: ends at %" PRId64 ", but there are %" PRId64 " tokens", path,
             offsets[count - 1], tokens);
out:
    free(offsets);
    return status;
}

static sida_status check_routing(check *c, int side, int64_t tokens) {
    const char *const *paths = sida_trace_paths[side];
    const axis k = {c->top_k, "top_k"}, t = {c->top, "top"}, none = {UNKNOWN, ""};
    const struct {
        int rank;
        axis last;
        column column;
    } columns[] = {
        {3,
         k,
         {paths[SIDA_TRACE_EXPERTS],
          SIDA_H5_U16,
          "token",
          true,
          visit_experts,
          {"an expert past the number of experts", "an expert chosen twice"}}},
        {3,
         k,
         {paths[SIDA_TRACE_ALPHA],
          SIDA_H5_F32,
          "token",
          true,
          visit_floats,
          {"not finite", "below 0"}}},
        {2, none, {paths[SIDA_TRACE_DROPPED], SIDA_H5_U8, "token", true, visit_flags, {NO_FLAG}}},
        {3,
         t,
         {paths[SIDA_TRACE_TOP_IDS],
          SIDA_H5_U16,
          "token",
          true,
          visit_experts,
          {"an expert past the number of experts", "an expert listed twice"}}},
        {3,
         t,
         {paths[SIDA_TRACE_TOP_LOGP],
          SIDA_H5_F16,
          "token",
          true,
          visit_logp,
          {"not finite", "a probability above 1", "not falling", "probabilities above 1 in all"}}},
    };
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) {
        const column *col = &columns[i].column;
        int64_t shape[3] = {0, 0, 1};
        const axis axes[3] = {{tokens, "the number of tokens"},
                              {c->layers[side], side ? "layers_decoder" : "layers_encoder"},
                              columns[i].last};
        if (!check_shape(c, col->path, col->type, columns[i].rank, axes, shape)) continue;
        sida_status status = check_values(c, col, shape[0], shape[1], shape[2]);
        if (status != SIDA_OK) return status;
    }
    return SIDA_OK;
}

/* Ids of a side or of the targets, with their offsets. *tokens: UNKNOWN when they are unsound. */
static sida_status check_ids(check *c, const char *path, const char *offsets, int64_t *tokens) {
    const axis any = {UNKNOWN, ""};
    const column ids = {path, SIDA_H5_I32, "token", false, visit_tokens, {ID_OUTSIDE}};
    sida_status status = SIDA_OK;
    if (check_shape(c, path, SIDA_H5_I32, 1, &any, tokens))
        SIDA_TRY(check_values(c, &ids, *tokens, 1, 1));
    else
        *tokens = UNKNOWN;
    SIDA_TRY(check_offsets(c, offsets, *tokens));
out:
    return status;
}

/* *all: tokens of the sides so far, UNKNOWN once one is. */
static sida_status check_side(check *c, int side, int64_t *all) {
    const char *const *paths = sida_trace_paths[side];
    int64_t tokens;
    sida_status status = SIDA_OK;
    if (c->layers[side] == 0 && !sida_h5_exists(c->file, paths[SIDA_TRACE_TOKENS])) goto out;
    SIDA_TRY(check_ids(c, paths[SIDA_TRACE_TOKENS], paths[SIDA_TRACE_OFFSETS], &tokens));
    if (c->layers[side] != 0) SIDA_TRY(check_routing(c, side, tokens));
    *all = tokens == UNKNOWN || *all == UNKNOWN ? UNKNOWN : *all + tokens;
out:
    return status;
}

static sida_status check_sequences(check *c) {
    static const column columns[] = {
        {"sequence/line", SIDA_H5_I64, "sequence", false, visit_lines, {"a line below 1"}},
        {"sequence/label", SIDA_H5_I32, "sequence", false, visit_labels, {"a label below -1"}},
        {"sequence/generated", SIDA_H5_U8, "sequence", false, visit_flags, {NO_FLAG}}};
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) {
        const axis s = {c->sequences, "the length of sequence/line"};
        int64_t rows;
        if (!check_shape(c, columns[i].path, columns[i].type, 1, &s, &rows)) continue;
        if (i == 0) c->sequences = rows;
        sida_status status = check_values(c, &columns[i], rows, 1, 1);
        if (status != SIDA_OK) return status;
    }
    if (c->sequences == 0) tell(c, "it has no sequences");
    return SIDA_OK;
}

static sida_status check_targets(check *c) {
    uint8_t *occurs = c->occurs;
    int64_t tokens;
    if (!sida_h5_exists(c->file, "target/tokens") && !sida_h5_exists(c->file, "target/offsets"))
        return SIDA_OK;
    c->occurs = NULL; /* a target needs no row of the embedding */
    sida_status status = check_ids(c, "target/tokens", "target/offsets", &tokens);
    c->occurs = occurs;
    return status;
}

static sida_status check_embedding(check *c) {
    static const column ids = {"embedding/ids", SIDA_H5_I32,         "row",
                               false,           visit_embedding_ids, {ID_OUTSIDE, "not rising"}},
                        rows = {"embedding/rows", SIDA_H5_F32,   "row", false,
                                visit_floats,     {"not finite"}};
    const axis any = {UNKNOWN, ""};
    int64_t count, shape[2];
    tally without = {0};
    sida_status status = SIDA_OK;
    if (check_shape(c, ids.path, ids.type, 1, &any, &count)) {
        SIDA_TRY(check_values(c, &ids, count, 1, 1));
        for (int64_t id = 0; c->occurs && id < c->vocabulary; id++)
            if (c->occurs[id]) add(&without, id);
        tell_tally(c, &without, ids.path, "id", 0, "occurs, but has no row");
    } else {
        count = UNKNOWN;
    }
    const axis want[2] = {{count, "the length of embedding/ids"}, {c->d_model, "d_model"}};
    if (check_shape(c, rows.path, rows.type, 2, want, shape))
        SIDA_TRY(check_values(c, &rows, shape[0], 1, shape[1]));
out:
    return status;
}

sida_status sida_trace_diagnose_file(sida_h5_file *file, sida_trace_report report, void *context) {
    check c = {.file = file,
               .report = report,
               .context = context,
               .is_part = sida_h5_file_kind(file) == SIDA_H5_PART,
               .sequences = UNKNOWN};
    int64_t tokens = 0;
    sida_status status = SIDA_OK;
    if (!check_attributes(&c)) return SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&c.stamps, UINT16_MAX + 1, "flags"));
    if (c.vocabulary > 0) SIDA_TRY(SIDA_ALLOC(&c.occurs, c.vocabulary, "flags of a vocabulary"));
    SIDA_TRY(check_sequences(&c));
    for (int side = 0; side < 2; side++) SIDA_TRY(check_side(&c, side, &tokens));
    if (tokens == 0) tell(&c, "it has no tokens");
    SIDA_TRY(check_targets(&c));
    if (!c.is_part) SIDA_TRY(check_embedding(&c)); /* parts have none */
out:
    free(c.stamps);
    free(c.occurs);
    return status;
}

sida_status sida_trace_diagnose(const char *path, sida_trace_report report, void *context) {
    sida_h5_file *file = NULL;
    sida_status status = sida_h5_open(&file, path, 1u << SIDA_H5_TRACE | 1u << SIDA_H5_PART, true);
    if (status == SIDA_OK) status = sida_trace_diagnose_file(file, report, context);
    sida_h5_close(file);
    return status;
}
