/* Training as a whole: the same bytes on every run, with any number of threads, and however often
 * it is killed and resumed; better than a token-id table where there is something to learn.
 *
 * Every training runs in a program of its own (this one, called as "worker"), so that it can be
 * killed and so that OpenMP starts afresh. */
#include "tests/train_data.h"

#include "runtime/predictor/sources.h"
#include "trainer/fit.h"
#include "trainer/train.h"

#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[] = "/tmp/sida-train-XXXXXX";
static char train_path[64], valid_path[64], reference_path[64], output_path[64], checkpoint[80];
static const char *self;

typedef struct worker {
    sida_train_options options;
    int64_t kill_step, cancel_step, steps;
    int64_t refine_step, refine_steps; /* the refinement's step that kills; < 0: that cancels */
} worker;

static sida_status on_step(void *context, double fraction, int64_t tokens) {
    worker *w = context;
    (void)fraction;
    (void)tokens;
    w->steps++;
    if (w->steps == w->kill_step) raise(SIGKILL);
    if (w->steps == w->cancel_step) return sida_fail(SIDA_ERROR_CANCELLED, "stopped");
    return SIDA_OK;
}

static sida_status on_refine_step(void *context, double fraction, int64_t tokens) {
    worker *w = context;
    (void)tokens;
    w->refine_steps += fraction > 0;
    if (w->refine_steps == 0 || w->refine_steps != llabs(w->refine_step)) return SIDA_OK;
    if (w->refine_step > 0) raise(SIGKILL);
    return sida_fail(SIDA_ERROR_CANCELLED, "stopped");
}

static sida_train_options small_options(void) {
    sida_train_options o = sida_train_defaults();
    o.trace = train_path;
    o.valid = valid_path;
    o.device = "cpu";
    o.epochs = 4;
    o.batch = 20; /* three shards; the last batch is smaller */
    o.warmup = 3;
    o.seed = 3;
    return o;
}

/* worker FOLDER OUTPUT EVERY RESUME KILL CANCEL LR REFINE */
static int run_worker(char **argv) {
    snprintf(train_path, sizeof train_path, "%s/T.h5", argv[0]);
    snprintf(valid_path, sizeof valid_path, "%s/V.h5", argv[0]);
    worker w = {.options = small_options()};
    w.options.output = argv[1];
    w.options.checkpoint_every = atoi(argv[2]);
    w.options.resume = atoi(argv[3]) != 0;
    w.kill_step = atoi(argv[4]);
    w.cancel_step = atoi(argv[5]);
    w.options.lr = atof(argv[6]);
    w.refine_step = atoi(argv[7]);
    w.options.on_step = on_step;
    w.options.on_refine_step = on_refine_step;
    w.options.context = &w;
    sida_status status = sida_train(&w.options, NULL);
    if (status == SIDA_ERROR_CANCELLED) return 3;
    if (status != SIDA_OK) fprintf(stderr, "%s\n", sida_last_message());
    return status == SIDA_OK ? 0 : 1;
}

typedef struct run {
    const char *output, *threads;
    int every, resume, kill, cancel, after_ms; /* after_ms > 0: killed from outside then */
    int refine;                                /* worker.refine_step */
    const char *lr;
} run;

/* The worker's wait status. */
static int start(run r) {
    char every[16], resume[16], kill_step[16], cancel[16], refine[16];
    snprintf(every, sizeof every, "%d", r.every);
    snprintf(resume, sizeof resume, "%d", r.resume);
    snprintf(kill_step, sizeof kill_step, "%d", r.kill);
    snprintf(cancel, sizeof cancel, "%d", r.cancel);
    snprintf(refine, sizeof refine, "%d", r.refine);
    char *const argv[] = {(char *)(uintptr_t)self,
                          (char *)(uintptr_t) "worker",
                          folder,
                          (char *)(uintptr_t)(r.output ? r.output : output_path),
                          every,
                          resume,
                          kill_step,
                          cancel,
                          (char *)(uintptr_t)(r.lr ? r.lr : "0.01"),
                          refine,
                          NULL};
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        setenv("OMP_NUM_THREADS", r.threads ? r.threads : "2", 1);
        execv(self, argv);
        _exit(127);
    }
    if (r.after_ms > 0) {
        usleep((useconds_t)r.after_ms * 1000);
        kill(child, SIGKILL);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static void expect_done(run r) {
    int status = start(r);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fail_msg("wait status %d", status);
}

static void expect_same(void) {
    test_bytes a = test_read(reference_path), b = test_read(output_path);
    assert_int_equal(a.size, b.size);
    assert_memory_equal(a.data, b.data, a.size);
    free(a.data);
    free(b.data);
    assert_int_equal(access(checkpoint, F_OK), -1);
    assert_int_equal(unlink(output_path), 0);
}

static int setup(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    snprintf(train_path, sizeof train_path, "%s/T.h5", folder);
    snprintf(valid_path, sizeof valid_path, "%s/V.h5", folder);
    snprintf(reference_path, sizeof reference_path, "%s/R.h5", folder);
    snprintf(output_path, sizeof output_path, "%s/P.h5", folder);
    snprintf(checkpoint, sizeof checkpoint, "%s.checkpoint", output_path);
    train_data d = train_data_default();
    d.sequences = 130;
    train_data_write(&d, train_path);
    d.sequences = 40;
    d.seed = 2;
    train_data_write(&d, valid_path);
    expect_done((run){.output = reference_path, .threads = "1"});
    return 0;
}

static int teardown(void **state) {
    (void)state;
    const char *paths[] = {train_path, valid_path, reference_path, output_path, checkpoint};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) unlink(paths[i]);
    return rmdir(folder);
}

static void any_number_of_threads(void **state) {
    (void)state;
    static const char *const threads[] = {"1", "2", "3", "5"};
    for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
        expect_done((run){.threads = threads[i]});
        expect_same();
    }
}

/* 28 steps in all, 7 an epoch. */
static void killed_once(void **state) {
    (void)state;
    static const int every[] = {0, 1, 3}, steps[] = {1, 6, 7, 8, 20, 28};
    for (size_t e = 0; e < sizeof every / sizeof *every; e++)
        for (size_t s = 0; s < sizeof steps / sizeof *steps; s++) {
            int status = start((run){.every = every[e], .kill = steps[s]});
            assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
            assert_int_equal(access(output_path, F_OK), -1);
            /* How often checkpoints are made does not shape the result. */
            expect_done((run){.every = every[(e + s) % 3], .resume = 1, .threads = "3"});
            expect_same();
        }
}

static void killed_again_and_again(void **state) {
    (void)state;
    int kills = 0;
    for (;; kills++) {
        int status = start((run){.every = 2, .resume = 1, .kill = 4});
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;
        assert_true(WIFSIGNALED(status) && kills < 40);
    }
    assert_true(kills >= 6);
    expect_same();
}

/* From outside, at any instruction: also inside the writing of a file. */
static void killed_at_any_time(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(8);
    int kills = 0;
    for (int round = 0; round < 30; round++) {
        int status = start((run){.every = 1,
                                 .resume = 1,
                                 .after_ms = 5 + (int)sida_rng_below(&rng, 60),
                                 .threads = "2"});
        kills += WIFSIGNALED(status);
        if (WIFEXITED(status)) {
            assert_int_equal(WEXITSTATUS(status), 0);
            expect_same();
        }
    }
    if (access(output_path, F_OK) != 0) expect_done((run){.resume = 1});
    expect_same();
    assert_true(kills > 0);
}

static void cancelled(void **state) {
    (void)state;
    int status = start((run){.cancel = 10});
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    assert_int_equal(access(checkpoint, F_OK), 0);
    expect_done((run){.resume = 1});
    expect_same();
}

/* The checkpoint holds the network's training whole, whenever it was last written: none of its 28
 * steps is done again. */
static void stopped_while_refining(void **state) {
    (void)state;
    static const int every[] = {0, 1, 3, 100};
    for (int i = 0; i < 8; i++) {
        const bool kills = i % 2;
        int status = start((run){.every = every[i / 2], .refine = kills ? 1 + i / 2 : -5});
        assert_true(kills ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL
                          : WIFEXITED(status) && WEXITSTATUS(status) == 3);
        assert_int_equal(access(output_path, F_OK), -1);
        assert_int_equal(access(checkpoint, F_OK), 0);
        if (i == 0) { /* and again, while it was resumed */
            status = start((run){.resume = 1, .kill = 1, .refine = 2});
            assert_true(WIFSIGNALED(status));
            assert_int_equal(access(checkpoint, F_OK), 0);
        }
        expect_done((run){.resume = 1, .kill = 1, .threads = "3"});
        expect_same();
    }
}

/* Nothing of it in the file, and the rest as it is beside one. */
static void without_refinement(void **state) {
    (void)state;
    sida_h5_file *files[2];
    sida_predictor_meta metas[2];
    sida_net *nets[2];
    sida_net_config config;
    sida_refine *refines[2];
    sida_train_options o = small_options();
    o.output = output_path;
    o.lr = 0.01;
    o.refine = false;
    assert_int_equal(sida_train(&o, NULL), SIDA_OK);
    const char *const paths[2] = {reference_path, output_path};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(sida_predictor_file_open(&files[i], &metas[i], paths[i]), SIDA_OK);
        assert_int_equal(
            sida_net_config_from_json(&config, json_object_get(metas[i].config, "net"), paths[i]),
            SIDA_OK);
        assert_int_equal(sida_net_read(&nets[i], files[i], &config), SIDA_OK);
        assert_int_equal(sida_refine_read(&refines[i], files[i], metas[i].config, &config),
                         SIDA_OK);
        sida_h5_close(files[i]);
    }
    const json_t *about = json_object_get(metas[0].config, "refine");
    assert_non_null(refines[0]);
    assert_int_equal(json_integer_value(json_object_get(about, "width")), refines[0]->width);
    assert_true(
        json_integer_value(json_object_get(json_object_get(about, "kept_epoch"), "encoder")) > 0);
    assert_null(refines[1]);
    assert_null(json_object_get(metas[1].config, "refine"));
    assert_memory_equal(nets[0]->parameters, nets[1]->parameters,
                        (size_t)nets[0]->parameter_count * sizeof(float));
    for (int i = 0; i < 2; i++) {
        sida_refine_destroy(refines[i]);
        sida_net_destroy(nets[i]);
        sida_predictor_meta_free(&metas[i]);
    }
    assert_int_equal(unlink(output_path), 0);
}

/* An LSTM's state is whole in its checkpoint, too. */
static void cancelled_lstm(void **state) {
    (void)state;
    test_bytes files[2];
    for (int i = 0; i < 2; i++) {
        worker w = {.options = small_options(), .cancel_step = 10};
        w.options.output = output_path;
        w.options.source = "lstm";
        w.options.context = &w;
        if (i == 1) {
            w.options.on_step = on_step;
            assert_int_equal(sida_train(&w.options, NULL), SIDA_ERROR_CANCELLED);
            assert_int_equal(access(checkpoint, F_OK), 0);
            w.options.on_step = NULL;
            w.options.resume = true;
        }
        if (sida_train(&w.options, NULL) != SIDA_OK) fail_msg("%s", sida_last_message());
        files[i] = test_read(output_path);
        assert_int_equal(unlink(output_path), 0);
    }
    assert_int_equal(files[0].size, files[1].size);
    assert_memory_equal(files[0].data, files[1].data, files[0].size);
    for (int i = 0; i < 2; i++) free(files[i].data);
}

static void refused(const sida_train_options *o, sida_status code, const char *words) {
    sida_status status = sida_train(o, NULL);
    if (status != code || !strstr(sida_last_message(), words))
        fail_msg("status %d, '%s': expected %d and '%s'", status, sida_last_message(), code, words);
}

static void resume_refuses(void **state) {
    (void)state;
    start((run){.kill = 10});
    sida_train_options good = small_options(), o;
    good.output = output_path;
    good.lr = 0.01;
    good.resume = true;
    o = good;
    o.lr = 0.02;
    refused(&o, SIDA_ERROR_MISMATCH, "training.lr");
    o = good;
    o.epochs = 5;
    refused(&o, SIDA_ERROR_MISMATCH, "training.epochs");
    o = good;
    o.top = 3;
    refused(&o, SIDA_ERROR_MISMATCH, "training.top");
    o = good;
    o.hidden = 32;
    refused(&o, SIDA_ERROR_MISMATCH, "net.hidden");
    o = good;
    o.blocks = 2;
    refused(&o, SIDA_ERROR_MISMATCH, "net.blocks");
    o = good;
    o.source = "lstm";
    refused(&o, SIDA_ERROR_MISMATCH, "net.lstm_layers");
    o = good;
    o.tkd = SIDA_TKD_L1_RENORM;
    refused(&o, SIDA_ERROR_MISMATCH, "training.tkd");
    o = good;
    o.labels = SIDA_LABELS_BEST;
    refused(&o, SIDA_ERROR_MISMATCH, "training.labels");
    o = good;
    o.patience = 2;
    refused(&o, SIDA_ERROR_MISMATCH, "training.patience");
    o = good;
    o.refine_width = 5;
    refused(&o, SIDA_ERROR_MISMATCH, "refine.width");
    o = good;
    o.refine_epochs = 5;
    refused(&o, SIDA_ERROR_MISMATCH, "refine.epochs");
    o = good;
    o.refine = false;
    refused(&o, SIDA_ERROR_MISMATCH, "with refine");
    o = good;
    o.trace = valid_path;
    refused(&o, SIDA_ERROR_MISMATCH, "trace");
    /* An option that only the checkpoint's training had. */
    assert_int_equal(unlink(checkpoint), 0);
    worker w = {.options = small_options(), .cancel_step = 3};
    w.options.output = output_path;
    w.options.lr = 0.01;
    w.options.source = "lstm";
    w.options.attention = SIDA_NET_SOFTMAX;
    w.options.on_step = on_step;
    w.options.context = &w;
    refused(&w.options, SIDA_ERROR_CANCELLED, "stopped");
    o = good;
    o.source = "lstm";
    refused(&o, SIDA_ERROR_MISMATCH, "net.attention \"softmax\", not the default");
    o.attention = SIDA_NET_NO_ATTENTION;
    refused(&o, SIDA_ERROR_MISMATCH, "net.attention");
    o.attention = SIDA_NET_SOFTMAX;
    o.bidirectional = true;
    refused(&o, SIDA_ERROR_MISMATCH, "net.bidirectional");
    assert_int_equal(unlink(checkpoint), 0);
    start((run){.kill = 10});
    /* A damaged one is refused, not used. */
    test_bytes bytes = test_read(checkpoint);
    bytes.data[bytes.size / 2] ^= 1;
    test_write(checkpoint, bytes.data, bytes.size);
    refused(&good, SIDA_ERROR_FORMAT, "P.h5.checkpoint");
    test_write(checkpoint, bytes.data, bytes.size / 2);
    refused(&good, SIDA_ERROR_FORMAT, "P.h5.checkpoint");
    free(bytes.data);
    assert_int_equal(access(output_path, F_OK), -1);
    assert_int_equal(unlink(checkpoint), 0);
}

static void other_options_other_bytes(void **state) {
    (void)state;
    expect_done((run){.lr = "0.011"});
    test_bytes a = test_read(reference_path), b = test_read(output_path);
    assert_true(a.size != b.size || memcmp(a.data, b.data, a.size) != 0);
    free(a.data);
    free(b.data);
    unlink(output_path);
}

/* P.h5 says what it is, its curve holds what an evaluation of it finds, and it has learnt what a
 * table cannot know: the token before. */
static void result(void **state) {
    (void)state;
    sida_h5_file *file;
    sida_predictor_meta meta;
    assert_int_equal(sida_predictor_file_open(&file, &meta, reference_path), SIDA_OK);
    assert_true(sida_fingerprint_equal(meta.model, (sida_fingerprint){77, 1}));
    const json_t *settings = json_object_get(meta.config, "training");
    assert_int_equal(json_integer_value(json_object_get(settings, "epochs")), 4);
    assert_int_equal(json_integer_value(json_object_get(settings, "top")), 5);
    assert_true(json_is_string(json_object_get(meta.config, "trace")));
    int64_t kept, shape[3];
    float losses[4], hits[4];
    assert_int_equal(sida_h5_get_i64(file, "kept_epoch", &kept), SIDA_OK);
    assert_int_equal(sida_h5_shape(file, "curve/loss", SIDA_H5_F32, 1, shape), SIDA_OK);
    assert_int_equal(shape[0], 4);
    assert_int_equal(sida_h5_read_rows(file, "curve/loss", SIDA_H5_F32, 0, 4, losses), SIDA_OK);
    assert_int_equal(sida_h5_read_rows(file, "curve/hit@1", SIDA_H5_F32, 0, 4, hits), SIDA_OK);
    assert_true(losses[3] < losses[0]);
    for (int i = 0; i < 4; i++) assert_true(hits[kept - 1] >= hits[i]);
    sida_predictor_meta_free(&meta);
    sida_h5_close(file);

    sida_dataset valid;
    sida_hash_source *source;
    sida_evaluation e;
    assert_int_equal(sida_dataset_load(&valid, valid_path, -1), SIDA_OK);
    assert_int_equal(
        sida_hash_source_open(&source, reference_path, sida_dataset_embedding(&valid), valid.model),
        SIDA_OK);
    assert_int_equal(sida_evaluate(&e, source, &valid, 1, NULL, NULL), SIDA_OK);
    assert_true((float)e.overall.hit[0] == hits[kept - 1]);
    sida_evaluation_free(&e);
    sida_hash_source_destroy(source);
    sida_dataset_free(&valid);
}

static double learnt(sida_train_options o) {
    o.output = output_path;
    o.epochs = 25;
    json_t *summary = NULL;
    assert_int_equal(sida_train(&o, &summary), SIDA_OK);
    double hit = json_real_value(
        json_object_get(json_object_get(json_object_get(summary, "valid"), "overall"), "hit@1"));
    json_decref(summary);
    return hit;
}

static void better_than_the_table(void **state) {
    (void)state;
    sida_train_options ours = small_options(), lstm = small_options();
    ours.batch = 5; /* so few sequences are few steps */
    lstm.source = "lstm";
    lstm.lr = 0.01;
    const double hits[2] = {learnt(ours), learnt(lstm)};
    sida_dataset train, valid;
    sida_hash_source *table;
    sida_evaluation e;
    assert_int_equal(sida_dataset_load(&train, train_path, -1), SIDA_OK);
    assert_int_equal(sida_dataset_load(&valid, valid_path, -1), SIDA_OK);
    assert_int_equal(sida_fit_source(&table, "table", 0, 0, &train), SIDA_OK);
    assert_int_equal(sida_evaluate(&e, table, &valid, 1, NULL, NULL), SIDA_OK);
    printf("hit@1: Transformer %.1f %%, LSTM %.1f %%, table %.1f %%\n", hits[0], hits[1],
           e.overall.hit[0]);
    /* Half of what decides is the token before; seen here: 63 and 72 against 52. */
    assert_true(hits[0] > e.overall.hit[0] + 5);
    assert_true(hits[1] > e.overall.hit[0] + 5);
    sida_evaluation_free(&e);
    sida_hash_source_destroy(table);
    sida_dataset_free(&train);
    sida_dataset_free(&valid);
    unlink(output_path);
}

/* --- early stopping */

typedef struct early {
    int64_t steps, cancel_step;
    int32_t epoch, block_epoch; /* at whose end a folder takes the output's place */
} early;

static sida_status early_step(void *context, double fraction, int64_t tokens) {
    early *e = context;
    (void)fraction, (void)tokens;
    if (++e->steps == e->cancel_step) return sida_fail(SIDA_ERROR_CANCELLED, "stopped");
    return SIDA_OK;
}

static void early_epoch(void *context, const sida_train_epoch *epoch) {
    early *e = context;
    e->epoch = epoch->epoch;
    if (epoch->epoch == e->block_epoch) assert_int_equal(mkdir(output_path, 0700), 0);
}

/* Ends when `patience` epochs were no better; killed and resumed anywhere, at the same epoch. */
static void stops_early(void **state) {
    (void)state;
    early e = {0};
    sida_train_options o = small_options();
    o.output = output_path;
    o.epochs = 60;
    o.lr = 0.03;
    o.schedule = SIDA_SCHEDULE_CONSTANT;
    o.patience = 2;
    o.on_step = early_step;
    o.on_epoch = early_epoch;
    o.context = &e;
    json_t *summary = NULL;
    assert_int_equal(sida_train(&o, &summary), SIDA_OK);
    const int32_t last = e.epoch;
    assert_true(last > 3 && last < 60);
    assert_int_equal(json_integer_value(json_object_get(summary, "epochs")), last);
    assert_int_equal(json_integer_value(json_object_get(summary, "kept_epoch")), last - 2);
    json_decref(summary);

    sida_h5_file *file;
    sida_predictor_meta meta;
    int64_t epochs, kept, shape[3];
    float hits[60];
    assert_int_equal(sida_predictor_file_open(&file, &meta, output_path), SIDA_OK);
    const json_t *settings = json_object_get(meta.config, "training");
    assert_int_equal(json_integer_value(json_object_get(settings, "epochs")), 60);
    assert_int_equal(json_integer_value(json_object_get(settings, "patience")), 2);
    assert_int_equal(sida_h5_get_i64(file, "epochs", &epochs), SIDA_OK);
    assert_int_equal(sida_h5_get_i64(file, "kept_epoch", &kept), SIDA_OK);
    assert_int_equal(epochs, last);
    assert_int_equal(kept, last - 2);
    assert_int_equal(sida_h5_shape(file, "curve/hit@1", SIDA_H5_F32, 1, shape), SIDA_OK);
    assert_int_equal(shape[0], last);
    assert_int_equal(sida_h5_read_rows(file, "curve/hit@1", SIDA_H5_F32, 0, last, hits), SIDA_OK);
    /* It had never been out of patience before. */
    for (int32_t i = 0, best = 0; i < last; i++) {
        if (hits[i] > hits[best]) best = i;
        assert_true(i - best < 2 || i == last - 1);
    }
    sida_predictor_meta_free(&meta);
    sida_h5_close(file);

    test_bytes whole = test_read(output_path);
    assert_int_equal(unlink(output_path), 0);
    o.resume = true;
    /* In the middle; in the last epoch; and where all that was left to do was the file. */
    const int64_t steps = 7 * (int64_t)last, cancels[] = {10, steps - 3, 0};
    for (int i = 0; i < 3; i++) {
        e = (early){.cancel_step = cancels[i], .block_epoch = cancels[i] == 0 ? last : 0};
        assert_int_not_equal(sida_train(&o, NULL), SIDA_OK);
        assert_int_equal(access(checkpoint, F_OK), 0);
        assert_int_equal(e.steps, cancels[i] > 0 ? cancels[i] : steps);
        if (cancels[i] == 0) assert_int_equal(rmdir(output_path), 0);
        const int64_t done = e.steps;
        e = (early){0};
        assert_int_equal(sida_train(&o, NULL), SIDA_OK);
        assert_int_equal(e.steps, steps - done);
        test_bytes again = test_read(output_path);
        assert_int_equal(again.size, whole.size);
        assert_memory_equal(again.data, whole.data, whole.size);
        free(again.data);
        assert_int_equal(unlink(output_path), 0);
    }
    free(whole.data);
}

/* Epochs that are exactly as good as the best are no better. */
static void stops_where_nothing_moves(void **state) {
    (void)state;
    json_t *summary = NULL;
    sida_train_options o = small_options();
    o.output = output_path;
    o.lr = 1e-12;
    for (int patience = 0; patience < 4; patience++) {
        o.patience = patience;
        assert_int_equal(sida_train(&o, &summary), SIDA_OK);
        assert_int_equal(json_integer_value(json_object_get(summary, "kept_epoch")), 1);
        assert_int_equal(json_integer_value(json_object_get(summary, "epochs")),
                         patience == 0 ? 4 : 1 + patience);
        json_decref(summary);
    }
    assert_int_equal(unlink(output_path), 0);
    o.patience = -1;
    refused(&o, SIDA_ERROR_ARGUMENT, "range");
}

int main(int argc, char **argv) {
    if (argc == 10 && strcmp(argv[1], "worker") == 0) return run_worker(argv + 2);
    self = "/proc/self/exe";
    const struct CMUnitTest tests[] = {cmocka_unit_test(any_number_of_threads),
                                       cmocka_unit_test(killed_once),
                                       cmocka_unit_test(killed_again_and_again),
                                       cmocka_unit_test(killed_at_any_time),
                                       cmocka_unit_test(cancelled),
                                       cmocka_unit_test(cancelled_lstm),
                                       cmocka_unit_test(stopped_while_refining),
                                       cmocka_unit_test(without_refinement),
                                       cmocka_unit_test(resume_refuses),
                                       cmocka_unit_test(other_options_other_bytes),
                                       cmocka_unit_test(result),
                                       cmocka_unit_test(better_than_the_table),
                                       cmocka_unit_test(stops_early),
                                       cmocka_unit_test(stops_where_nothing_moves)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
