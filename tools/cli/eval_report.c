#include "tools/cli/eval_report.h"

#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "tools/cli/cli.h"

#include <assert.h>
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

/* --- the layers behind one whose routing is known */

sida_status sida_eval_add_rival(sida_eval_refined *refined, const char *name,
                                const sida_behind *figures) {
    sida_status status = SIDA_OK;
    const int32_t i = refined->rival_count;
    assert(i < SIDA_EVAL_RIVALS);
    SIDA_TRY(SIDA_ALLOC(&refined->better[i], refined->figures.scope_count, "a comparison"));
    SIDA_TRY(sida_refined_compare(refined->better[i], &refined->figures, figures));
    refined->rivals[i] = (sida_refined_rival){name, figures, refined->better[i]};
    refined->rival_count++;
out:
    return status;
}

void sida_eval_refined_free(sida_eval_refined *refined) {
    for (int32_t i = 0; i < SIDA_EVAL_RIVALS; i++) free(refined->better[i]);
    sida_refined_free(&refined->figures);
    sida_refined_free(&refined->hidden);
    *refined = (sida_eval_refined){0};
}

static void print_difference(const sida_interval *i) {
    printf("  %+.2f [%+.2f, %+.2f]", i->mean, i->low, i->high);
}

static void print_behind(const char *scope, const char *name, const sida_scores *s, int32_t chosen,
                         const sida_comparison *better) {
    printf("%-8s %-13s %7.2f %7.2f %9.2f", scope, name, s->hit[0], s->hit[1], s->set_recall_equal);
    if (chosen > 1) printf(" %7.2f", s->slot_recall[0]);
    if (better) {
        print_difference(&better->hit[0]);
        print_difference(&better->hit[1]);
        print_difference(&better->set_recall_equal);
        if (chosen > 1) print_difference(&better->slot_recall);
    }
    putchar('\n');
}

static void print_refined(const sida_eval_refined *refined) {
    static const char *const scope_names[3] = {"overall", "encoder", "decoder"};
    const sida_refined *r = &refined->figures;
    const char *slot[2] = {"", ""};
    if (r->chosen > 1) slot[0] = "  slot@k", slot[1] = ", slot@k";
    for (int32_t s = 0; s < r->scope_count; s++) {
        const sida_refined_scope *scope = &r->scopes[s];
        if (scope->side < 0) {
            char title[40];
            snprintf(title, sizeof title, "behind MoE %d, %%", scope->behind);
            printf("%-22s %7s %7s %9s%s  refined is better by: hit@1, hit@3, equal%s\n", title,
                   "hit@1", "hit@3", "equal", slot[0], slot[1]);
            /* Both sides are one where the other has no such layer. */
            if (s + 2 == r->scope_count || r->scopes[s + 2].side < 0) continue;
        }
        print_behind(scope_names[scope->side + 1], "refined", &r->refined.scores[s], r->chosen,
                     NULL);
        for (int32_t i = 0; i < refined->rival_count; i++) {
            const sida_refined_rival *rival = &refined->rivals[i];
            char label[16];
            snprintf(label, sizeof label, "%s", rival->name);
            for (char *c = label; *c; c++) *c = *c == '_' ? ' ' : *c;
            print_behind("", label, &rival->figures->scores[s], r->chosen, &rival->better[s]);
        }
    }
}

void sida_eval_print_text(const sida_eval_row *rows, int32_t count,
                          const sida_eval_refined *refined) {
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
        if (e->chosen > 1) print_interval("slot@k", &rows[r].better[0].slot_recall);
        putchar('\n');
    }
    print_refined(refined);
}

sida_status sida_eval_print_json(const sida_eval_row *rows, int32_t count,
                                 const sida_eval_refined *refined, const char *trace) {
    const sida_evaluation *ours = &rows[0].figures;
    json_t *root = sida_evaluation_to_json(ours), *others = json_object();
    for (int32_t r = 1; r < count; r++) {
        json_t *row = sida_evaluation_to_json(&rows[r].figures);
        json_object_set_new(row, "better_by", sida_comparisons_to_json(rows[r].better, ours));
        json_object_set_new(others, rows[r].name, row);
    }
    json_object_set_new(root, "baselines", others);
    if (refined->figures.scope_count > 0)
        json_object_set_new(
            root, "refined",
            sida_refined_to_json(&refined->figures, refined->rivals, refined->rival_count));
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
