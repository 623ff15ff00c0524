#include "tools/cli/plot.h"

#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "formats/h5.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *const hit_names[3] = {"hit@1", "hit@3", "hit@5"};

static bool is_executable(const char *folder, size_t length) {
    char path[4096];
    snprintf(path, sizeof path, "%.*s/gnuplot", (int)length, folder);
    return length > 0 && access(path, X_OK) == 0;
}

static bool has_gnuplot(void) {
    for (const char *at = getenv("PATH"); at; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL)
        if (is_executable(at, strcspn(at, ":"))) return true;
    return false;
}

sida_status sida_plot_check(const char *path) {
    size_t length = strlen(path);
    if (length < 5 || strcmp(path + length - 4, ".svg") != 0)
        return sida_fail(SIDA_ERROR_ARGUMENT, "--plot %s: expected a name that ends in .svg", path);
    if (!has_gnuplot())
        return sida_fail(SIDA_ERROR_UNSUPPORTED,
                         "--plot %s: needs gnuplot, which is not in PATH; install the package "
                         "gnuplot-nox",
                         path);
    return sida_file_check_writable(path);
}

/* Text between double quotes of a script. */
static void write_text(FILE *script, const char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < ' ') continue;
        if (strchr("\"\\", *text)) fputc('\\', script);
        fputc(*text, script);
    }
}

/* Starts gnuplot with its output at `temporary`. */
static sida_status begin(FILE **script, const char *temporary, int height) {
    signal(SIGPIPE, SIG_IGN); /* a gnuplot that gives up early shows in its exit status */
    *script = popen("exec gnuplot >/dev/null 2>&1", "w");
    if (!*script) return sida_fail(SIDA_ERROR_IO, "gnuplot: %s", strerror(errno));
    fprintf(*script, "set terminal svg size 860,%d noenhanced font 'sans,13' background 'white'\n",
            height);
    fputs("set output \"", *script);
    write_text(*script, temporary);
    fputs("\"\nset border 3 lc rgb '#666666'\nset tics nomirror\nset grid y lc rgb '#dddddd'\n"
          "set key outside right top\n",
          *script);
    return SIDA_OK;
}

/* Waits for gnuplot and gives the picture its name. Takes script and temporary over; status: what
 * happened so far. */
static sida_status finish(sida_status status, FILE *script, char *temporary, const char *path) {
    if (script) {
        int code = pclose(script);
        if (status == SIDA_OK && !(WIFEXITED(code) && WEXITSTATUS(code) == 0))
            status = sida_fail(SIDA_ERROR_IO, "%s: gnuplot failed (its status: %d)", path, code);
    }
    if (status == SIDA_OK) {
        status = sida_file_commit(temporary, path);
    } else if (temporary) {
        unlink(temporary);
    }
    free(temporary);
    return status;
}

/* The data behind bars: a line a layer, a column a source and k. */
static void write_layers(FILE *script, json_t *const *figures, int32_t count) {
    const json_t *layers = json_object_get(figures[0], "layers");
    fputs("$layers << EOD\n", script);
    for (size_t l = 0; l < json_array_size(layers); l++) {
        const json_t *first = json_array_get(layers, l);
        fprintf(script, "\"%s %lld\"", json_string_value(json_object_get(first, "side")),
                (long long)json_integer_value(json_object_get(first, "layer")));
        for (int h = 0; h < 2; h++)
            for (int32_t i = 0; i < count; i++) {
                const json_t *layer = json_array_get(json_object_get(figures[i], "layers"), l);
                fprintf(script, " %.4f", json_real_value(json_object_get(layer, hit_names[h])));
            }
        fputc('\n', script);
    }
    fputs("EOD\n", script);
}

/* Bars of one k. */
static void plot_bars(FILE *script, const char *const *names, int32_t count, int hit) {
    fprintf(script,
            "set title '%s by MoE layer'\nset ylabel 'per cent'\nset yrange [0:100]\n"
            "set style data histogram\nset style histogram clustered gap 1\n"
            "set style fill solid 0.85 border lc rgb 'white'\nset xtics rotate by -30\nplot ",
            hit_names[hit]);
    for (int32_t i = 0; i < count; i++) {
        fprintf(script, "%s$layers using %d:xtic(1) title \"", i ? ", " : "", 2 + hit * count + i);
        write_text(script, names[i]);
        fprintf(script, "\" lt %d", i + 1);
    }
    fputc('\n', script);
}

sida_status sida_plot_layers(const char *path, const char *const *names, json_t *const *figures,
                             int32_t count) {
    sida_status status = SIDA_OK;
    char *temporary = NULL;
    FILE *script = NULL;
    SIDA_TRY(sida_file_temporary_name(&temporary, path));
    SIDA_TRY(begin(&script, temporary, 720));
    write_layers(script, figures, count);
    fputs("set multiplot layout 2,1\n", script);
    for (int h = 0; h < 2; h++) plot_bars(script, names, count, h);
    fputs("unset multiplot\n", script);
out:
    return finish(status, script, temporary, path);
}

/* A column of the training's curve. free(). */
static sida_status read_curve(float **out, int64_t *epochs, sida_h5_file *file, const char *name) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_h5_shape(file, name, SIDA_H5_F32, 1, epochs));
    SIDA_TRY(SIDA_ALLOC(out, *epochs, "a curve"));
    SIDA_TRY(sida_h5_read_rows(file, name, SIDA_H5_F32, 0, *epochs, *out));
out:
    return status;
}

sida_status sida_plot_training(const char *path, const char *predictor, const json_t *figures) {
    sida_status status = SIDA_OK;
    static const char *const columns[3] = {"curve/loss", "curve/hit@1", "curve/hit@3"};
    sida_h5_file *file = NULL;
    char *temporary = NULL;
    FILE *script = NULL;
    float *curves[3] = {NULL};
    int64_t epochs = 0;
    json_t *all[1] = {(json_t *)(uintptr_t)figures};
    SIDA_TRY(sida_h5_open(&file, predictor, 1u << SIDA_H5_PREDICTOR, false));
    for (int c = 0; c < 3; c++) SIDA_TRY(read_curve(&curves[c], &epochs, file, columns[c]));
    SIDA_TRY(sida_file_temporary_name(&temporary, path));
    SIDA_TRY(begin(&script, temporary, 900));
    fputs("$curve << EOD\n", script);
    for (int64_t e = 0; e < epochs; e++)
        fprintf(script, "%lld %.6f %.4f %.4f\n", (long long)e + 1, (double)curves[0][e],
                (double)curves[1][e], (double)curves[2][e]);
    fputs("EOD\n", script);
    write_layers(script, all, 1);
    fputs("set multiplot layout 3,1\nset title 'training loss'\nset ylabel 'loss a pair'\n"
          "set xlabel 'epoch'\nplot $curve using 1:2 with linespoints pt 7 ps 0.4 lt 1 title "
          "'training'\n"
          "set title 'hit rate on the validation trace'\nset ylabel 'per cent'\n"
          "plot $curve using 1:3 with linespoints pt 7 ps 0.4 lt 1 title 'hit@1', "
          "$curve using 1:4 with linespoints pt 7 ps 0.4 lt 2 title 'hit@3'\nunset xlabel\n",
          script);
    plot_bars(script, (const char *const[]){"hit@1"}, 1, 0);
    fputs("unset multiplot\n", script);
out:
    sida_h5_close(file);
    for (int c = 0; c < 3; c++) free(curves[c]);
    return finish(status, script, temporary, path);
}
