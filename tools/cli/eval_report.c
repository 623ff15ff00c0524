#include "tools/cli/eval_report.h"

#include "formats/base/file.h"
#include "tools/cli/cli.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const side_names[2] = {"encoder", "decoder"};

static void print_slots(const char *label, const sida_scores *s) {
    printf("%-18s %7.2f %7.2f %7.2f %9.2f %9.2f\n", label, s->slot_recall[0], s->slot_recall[1],
           s->exact_set, s->weight_recall[0], s->weight_recall[1]);
}

static void print_scores(const char *label, const sida_scores *s) {
    printf("%-18s %7.2f %7.2f %7.2f %9.2f %9.2f %9.2f %9.2f %9.2f\n", label, s->hit[0], s->hit[1],
           s->hit[2], s->set_recall, s->set_precision, s->set_recall_equal, s->alpha_error,
           s->alpha_constant_error);
}

static void print_rows(const sida_evaluation *e,
                       void (*print)(const char *label, const sida_scores *s)) {
    char label[40];
    print("overall", &e->overall);
    print("  of all tokens", &e->all.overall);
    for (int side = 0, at = 0; side < 2; side++) {
        if (e->layers[side] == 0) continue;
        print(side_names[side], &e->sides[side]);
        for (int l = 0; l < e->layers[side]; l++) {
            snprintf(label, sizeof label, "  %s MoE %d", side_names[side], l);
            print(label, &e->per_layer[at++]);
        }
    }
}

static void print_bins(const sida_evaluation *e) {
    printf("%-18s %9s %9s %9s\n", "  predicted alpha", "pairs", "mean", "applied");
    for (int b = 0; b < SIDA_CALIBRATION_BINS; b++)
        if (e->calibration[b].pairs > 0)
            printf("  %.1f to %.1f        %9" PRId64 " %9.2f %9.2f\n",
                   (double)b / SIDA_CALIBRATION_BINS, (b + 1.0) / SIDA_CALIBRATION_BINS,
                   e->calibration[b].pairs, e->calibration[b].predicted, e->calibration[b].applied);
    if (!e->has_margins) return;
    printf("%-18s %9s %9s %9s %9s\n", "  router's margin", "pairs", "hit@1", "hit@3", "hit@5");
    for (int b = 0; b < SIDA_MARGIN_BINS; b++)
        if (e->margins[b].pairs > 0)
            printf("  %.3f to %.3f    %9" PRId64 " %9.2f %9.2f %9.2f\n", e->margins[b].from,
                   e->margins[b].to, e->margins[b].pairs, e->margins[b].hit[0],
                   e->margins[b].hit[1], e->margins[b].hit[2]);
}

static void print_interval(const char *what, const sida_interval *i) {
    printf("  %s %+.2f [%+.2f, %+.2f]", what, i->mean, i->low, i->high);
}

void sida_eval_print_text(const sida_eval_row *rows, int32_t count) {
    for (int32_t r = 0; r < count; r++) {
        const sida_evaluation *e = &rows[r].figures;
        char title[40];
        snprintf(title, sizeof title, "%.30s, %%", rows[r].name);
        printf("%-18s %7s %7s %7s %9s %9s %9s %9s %9s\n", title, "hit@1", "hit@3", "hit@5",
               "recall", "precision", "equal", "alpha err", "constant");
        print_rows(e, print_scores);
        if (e->chosen > 1) {
            snprintf(title, sizeof title, "  its %d experts, %%", e->chosen);
            printf("%-18s %7s %7s %7s %9s %9s\n", title, "slot@k", "slot@2k", "exact", "weight@k",
                   "weight@2k");
            print_rows(e, print_slots);
        }
        if (r == 0) {
            print_bins(e);
            continue;
        }
        printf("  %s is better by", rows[0].name);
        print_interval("hit@1", &rows[r].better[0].hit[0]);
        print_interval("hit@3", &rows[r].better[0].hit[1]);
        print_interval("equal", &rows[r].better[0].set_recall_equal);
        putchar('\n');
    }
}

sida_status sida_eval_print_json(const sida_eval_row *rows, int32_t count, const char *trace) {
    const sida_evaluation *ours = &rows[0].figures;
    json_t *root = sida_evaluation_to_json(ours), *others = json_object();
    for (int32_t r = 1; r < count; r++) {
        json_t *row = sida_evaluation_to_json(&rows[r].figures);
        json_object_set_new(row, "better_by",
                            sida_comparison_to_json(rows[r].better, ours->layers));
        json_object_set_new(others, rows[r].name, row);
    }
    json_object_set_new(root, "baselines", others);
    json_object_set_new(root, "source", json_string(rows[0].name));
    json_object_set_new(root, "top_k", json_integer(ours->set_k));
    json_object_set_new(root, "sequences", json_integer(ours->sequences));
    json_object_set_new(root, "trace", json_string(trace));
    return sida_cli_print_json(root);
}

static void write_line(FILE *file, const char *name, int32_t sequence, int side,
                       const sida_sums *s) {
    fprintf(file,
            "%s\t%d\t%s\t%" PRId64 "\t%" PRId64 "\t%" PRId64 "\t%" PRId64 "\t%" PRId64 "\t%" PRId64
            "\t%" PRId64 "\t%" PRId64 "\t%" PRId64 "\t%.9g\t%.9g\t%.9g\t%" PRId64 "\t%.9g\n",
            name, sequence, side_names[side], s->pairs, s->hits[0], s->hits[1], s->hits[2],
            s->slots[0], s->slots[1], s->exact, s->sets, s->predicted_sets, s->recall, s->precision,
            s->equal, s->alpha_pairs, s->alpha);
}

sida_status sida_eval_write_sequences(const sida_eval_row *rows, int32_t count, const char *path) {
    sida_status status = SIDA_OK;
    char *temporary = NULL;
    FILE *file = NULL;
    SIDA_TRY(sida_file_temporary_name(&temporary, path));
    file = fopen(temporary, "w");
    if (!file) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    fputs("source\tsequence\tside\tpairs\thit@1\thit@3\thit@5\tslots_k\tslots_2k\texact\tsets\t"
          "predicted_sets\trecall\tprecision\tequal\talpha_pairs\talpha_error\n",
          file);
    for (int32_t r = 0; r < count; r++)
        for (int32_t q = 0; q < rows[r].figures.sequences; q++)
            for (int side = 0; side < 2; side++)
                if (rows[r].figures.layers[side] > 0)
                    write_line(file, rows[r].name, q, side,
                               &rows[r].figures.per_sequence[(int64_t)q * 2 + side]);
    bool failed = ferror(file) || fflush(file) != 0;
    int reason = errno;
    failed = fclose(file) != 0 || failed;
    file = NULL;
    if (failed) SIDA_FAIL(SIDA_ERROR_IO, "%s: cannot be written: %s", path, strerror(reason));
    status = sida_file_commit(temporary, path);
    free(temporary);
    return status;
out:
    if (temporary) unlink(temporary);
    free(temporary);
    return status;
}
