/* A folder of its own for a test that trains: two traces and a predictor. */
#ifndef SIDA_TESTS_TRAIN_FOLDER_H
#define SIDA_TESTS_TRAIN_FOLDER_H

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char folder[] = "/tmp/sida-train-XXXXXX";
static char train_path[64], valid_path[64], output_path[64];

static int setup(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    snprintf(train_path, sizeof train_path, "%s/T.h5", folder);
    snprintf(valid_path, sizeof valid_path, "%s/V.h5", folder);
    snprintf(output_path, sizeof output_path, "%s/P.h5", folder);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    unlink(train_path);
    unlink(valid_path);
    unlink(output_path);
    return rmdir(folder);
}

#endif
