#include "formats/spiece.h"

#include "formats/base/memory.h"
#include "formats/base/text.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* Fields of sentencepiece_model.proto. */
enum {
    MODEL_PIECE = 1,
    MODEL_TRAINER = 2,
    MODEL_NORMALIZER = 3,
    MODEL_DENORMALIZER = 5,
    PIECE_TEXT = 1,
    PIECE_SCORE = 2,
    PIECE_TYPE = 3,
    TRAINER_TYPE = 3,
    TRAINER_SUFFIX = 24,
    TRAINER_BYTE_FALLBACK = 35,
    TRAINER_UNK_ID = 40,
    TRAINER_PAD_ID = 43,
    TRAINER_UNK_SURFACE = 44,
    TRAINER_PAD_PIECE = 48,
    NORMALIZER_CHARSMAP = 2,
    NORMALIZER_ESCAPE = 5
};
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_USER = 4, TYPE_BYTE = 6 };
enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

/* libsentencepiece's fixed stack buffers: 32 matches in the normaliser, 64 user symbols. */
enum { MAX_MATCHES = 32, MAX_USER_BYTES = 64 };
enum { MAX_CHARSMAP_BYTES = 4 << 20, MAX_REPLACEMENT_BYTES = 128, MAX_RULE_BYTES = 64 };

typedef struct span {
    const uint8_t *data;
    size_t bytes;
} span;

typedef struct field {
    uint32_t number, wire;
    uint64_t value; /* varint, 32 and 64 bits */
    span body;      /* WIRE_BYTES */
} field;

typedef struct buffer {
    uint8_t *data;
    size_t used, capacity;
} buffer;

typedef struct model_walk {
    const char *name;
    buffer out;
    int pieces, ordinary, unknown;
    uint64_t model_type;
} model_walk;

static bool read_varint(span *in, uint64_t *value) {
    *value = 0;
    for (unsigned shift = 0; shift < 64 && in->bytes > 0; shift += 7) {
        uint8_t byte = *in->data++;
        in->bytes--;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) return true;
    }
    return false;
}

/* Takes the next field off `in`; false when the wire format is broken. */
static bool read_field(span *in, field *out) {
    uint64_t key;
    *out = (field){0};
    if (!read_varint(in, &key) || key >> 3 == 0 || key >> 3 > 0x1fffffff) return false;
    out->number = (uint32_t)(key >> 3);
    out->wire = (uint32_t)(key & 7);
    if (out->wire == WIRE_VARINT) return read_varint(in, &out->value);
    if (out->wire == WIRE_BYTES) {
        if (!read_varint(in, &out->value) || out->value > in->bytes) return false;
        out->body = (span){in->data, (size_t)out->value};
    } else if (out->wire == WIRE_32 || out->wire == WIRE_64) {
        size_t bytes = out->wire == WIRE_32 ? 4 : 8;
        if (in->bytes < bytes) return false;
        memcpy(&out->value, in->data, bytes);
        out->body = (span){in->data, bytes};
    } else {
        return false; /* groups are not used by this message */
    }
    in->data += out->body.bytes;
    in->bytes -= out->body.bytes;
    return true;
}

static sida_status put(buffer *out, const void *data, size_t bytes) {
    sida_status status = SIDA_GROW(&out->data, &out->capacity, out->used + bytes, "a tokenizer");
    if (status != SIDA_OK) return status;
    if (bytes > 0) memcpy(out->data + out->used, data, bytes);
    out->used += bytes;
    return SIDA_OK;
}

static sida_status put_varint(buffer *out, uint64_t value) {
    uint8_t text[10];
    size_t used = 0;
    for (; value >= 0x80; value >>= 7) text[used++] = (uint8_t)(value | 0x80);
    text[used++] = (uint8_t)value;
    return put(out, text, used);
}

static sida_status put_field(buffer *out, const field *item) {
    sida_status status = put_varint(out, (uint64_t)item->number << 3 | item->wire);
    if (status == SIDA_OK && (item->wire == WIRE_VARINT || item->wire == WIRE_BYTES))
        status = put_varint(out, item->value);
    if (status == SIDA_OK) status = put(out, item->body.data, item->body.bytes);
    return status;
}

static sida_status put_message(buffer *out, uint32_t number, const buffer *body) {
    field item = {number, WIRE_BYTES, body->used, {body->data, body->used}};
    return put_field(out, &item);
}

static sida_status broken(const model_walk *walk) {
    return sida_fail(SIDA_ERROR_FORMAT, "%s: not a SentencePiece model: its fields are broken",
                     walk->name);
}

static sida_status check_piece(model_walk *walk, span in) {
    span text = {(const uint8_t *)"", 0};
    float score = 0;
    uint64_t type = TYPE_NORMAL;
    field item;
    int index = walk->pieces++;
    while (in.bytes > 0) {
        if (!read_field(&in, &item)) return broken(walk);
        if (item.number == PIECE_TEXT && item.wire == WIRE_BYTES)
            text = item.body;
        else if (item.number == PIECE_SCORE && item.wire == WIRE_32)
            memcpy(&score, item.body.data, sizeof score);
        else if (item.number == PIECE_TYPE && item.wire == WIRE_VARINT)
            type = item.value;
    }
    if (walk->pieces > SIDA_SPIECE_MAX_PIECES)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: more than %d pieces", walk->name,
                         SIDA_SPIECE_MAX_PIECES);
    if (text.bytes == 0 || text.bytes > SIDA_SPIECE_MAX_PIECE_BYTES ||
        !sida_text_is_utf8((const char *)text.data, text.bytes))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: piece %d: not 1 to %d bytes of UTF-8", walk->name,
                         index, SIDA_SPIECE_MAX_PIECE_BYTES);
    if (!isfinite(score) || fabsf(score) > 1e9f)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: piece %d: its score is out of range", walk->name,
                         index);
    if (type < TYPE_NORMAL || type > TYPE_BYTE)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: piece %d: unknown type %llu", walk->name, index,
                         (unsigned long long)type);
    if (type == TYPE_USER && text.bytes > MAX_USER_BYTES)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: piece %d: a user symbol of more than %d bytes",
                         walk->name, index, MAX_USER_BYTES);
    if (type == TYPE_NORMAL) walk->ordinary++;
    if (type == TYPE_UNKNOWN) walk->unknown++;

    sida_status status;
    buffer body = {0};
    field fields[3] = {{PIECE_TEXT, WIRE_BYTES, text.bytes, text},
                       {PIECE_SCORE, WIRE_32, 0, {(const uint8_t *)&score, sizeof score}},
                       {PIECE_TYPE, WIRE_VARINT, type, {NULL, 0}}};
    for (int i = 0; i < 3; i++) SIDA_TRY(put_field(&body, &fields[i]));
    SIDA_TRY(put_message(&walk->out, MODEL_PIECE, &body));
out:
    free(body.data);
    return status;
}

static sida_status check_trainer(model_walk *walk, span in) {
    sida_status status = SIDA_OK;
    buffer body = {0};
    field item;
    while (in.bytes > 0) {
        if (!read_field(&in, &item)) {
            status = broken(walk);
            goto out;
        }
        uint32_t number = item.number;
        bool flag = number == TRAINER_TYPE || number == TRAINER_SUFFIX ||
                    number == TRAINER_BYTE_FALLBACK ||
                    (number >= TRAINER_UNK_ID && number <= TRAINER_PAD_ID);
        bool text = number >= TRAINER_UNK_SURFACE && number <= TRAINER_PAD_PIECE;
        if (number == TRAINER_TYPE) walk->model_type = item.value;
        if ((flag && item.wire == WIRE_VARINT) ||
            (text && item.wire == WIRE_BYTES && item.body.bytes <= SIDA_SPIECE_MAX_PIECE_BYTES &&
             sida_text_is_utf8((const char *)item.body.data, item.body.bytes)))
            SIDA_TRY(put_field(&body, &item));
        else if (flag || text)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a bad field %u of the training options", walk->name,
                      number);
    }
    SIDA_TRY(put_message(&walk->out, MODEL_TRAINER, &body));
out:
    free(body.data);
    return status;
}

/* A unit of a Darts double array. */
static uint32_t unit_at(span units, size_t index) {
    uint32_t unit;
    memcpy(&unit, units.data + 4 * index, sizeof unit);
    return unit;
}
static uint32_t unit_offset(uint32_t unit) {
    return (unit >> 10) << ((unit & (1u << 9)) >> 6);
}

typedef struct charsmap {
    span units, text; /* the double array, and NUL-ended replacements */
    uint8_t *matches; /* a unit: 0 unseen, 255 on the path, else 1 + most matches below it */
} charsmap;

/* Follows every path below `index`: at most MAX_MATCHES rules match on each, none has a cycle, and
 * each replacement is a short UTF-8 text within the block. */
static bool check_paths(charsmap *map, size_t index, int depth) {
    uint32_t unit = unit_at(map->units, index);
    size_t base = index ^ unit_offset(unit);
    int own = 0, below = 0;
    if (depth > MAX_RULE_BYTES) return false;
    map->matches[index] = 255;
    if (depth > 0 && (unit >> 8 & 1)) {
        size_t value = unit_at(map->units, base) & 0x7fffffff;
        if (value >= map->text.bytes) return false;
        const char *text = (const char *)map->text.data + value;
        size_t bytes = strnlen(text, map->text.bytes - value);
        if (bytes > MAX_REPLACEMENT_BYTES || bytes == map->text.bytes - value ||
            !sida_text_is_utf8(text, bytes))
            return false;
        own = 1;
    }
    for (size_t label = 1; label < 256; label++) { /* no text holds a NUL */
        size_t child = base ^ label;
        if ((unit_at(map->units, child) & 0x800000ff) != label) continue;
        if (map->matches[child] == 255) return false;
        if (map->matches[child] == 0 && !check_paths(map, child, depth + 1)) return false;
        if (map->matches[child] - 1 > below) below = map->matches[child] - 1;
    }
    if (own + below > MAX_MATCHES) return false;
    map->matches[index] = (uint8_t)(1 + own + below);
    return true;
}

static sida_status check_charsmap(const model_walk *walk, span in) {
    if (in.bytes == 0) return SIDA_OK;
    uint32_t bytes = 0;
    bool sound = in.bytes > 4 && in.bytes <= MAX_CHARSMAP_BYTES;
    if (sound) {
        memcpy(&bytes, in.data, sizeof bytes);
        /* A whole number of blocks of 256 units: every label of a node stays inside. */
        sound = bytes > 0 && bytes < in.bytes - 4 && bytes % 1024 == 0;
    }
    charsmap map = {{in.data + 4, bytes}, {in.data + 4 + bytes, in.bytes - 4 - bytes}, NULL};
    size_t count = bytes / 4;
    for (size_t i = 0; sound && i < count; i++) {
        uint32_t unit = unit_at(map.units, i);
        if (i == 0 || !(unit >> 31)) sound = (i ^ unit_offset(unit)) < count;
    }
    if (sound) {
        sida_status status = SIDA_ALLOC(&map.matches, count, walk->name);
        if (status != SIDA_OK) return status;
        sound = check_paths(&map, 0, 0);
        free(map.matches);
    }
    return sound
               ? SIDA_OK
               : sida_fail(SIDA_ERROR_FORMAT, "%s: its normalisation table is damaged", walk->name);
}

static sida_status check_normalizer(model_walk *walk, uint32_t number, span in) {
    sida_status status = SIDA_OK;
    buffer body = {0};
    field item;
    while (in.bytes > 0) {
        if (!read_field(&in, &item)) {
            status = broken(walk);
            goto out;
        }
        if (item.number < NORMALIZER_CHARSMAP || item.number > NORMALIZER_ESCAPE) continue;
        if (item.wire != (item.number == NORMALIZER_CHARSMAP ? WIRE_BYTES : WIRE_VARINT))
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a bad field %u of the normaliser", walk->name,
                      item.number);
        if (item.number == NORMALIZER_CHARSMAP) SIDA_TRY(check_charsmap(walk, item.body));
        SIDA_TRY(put_field(&body, &item));
    }
    SIDA_TRY(put_message(&walk->out, number, &body));
out:
    free(body.data);
    return status;
}

sida_status sida_spiece_check(uint8_t **out, size_t *out_bytes, const void *data, size_t size,
                              const char *name) {
    sida_status status = SIDA_OK;
    model_walk walk = {.name = name, .model_type = 1};
    span in = {data, size};
    field item;
    *out = NULL;
    *out_bytes = 0;
    if (size == 0 || size > SIDA_SPIECE_MAX_BYTES)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %zu bytes, a SentencePiece model has 1 to %zu", name,
                  size, SIDA_SPIECE_MAX_BYTES);
    while (in.bytes > 0) {
        if (!read_field(&in, &item)) {
            status = broken(&walk);
            goto out;
        }
        bool known = item.number >= MODEL_PIECE && item.number <= MODEL_DENORMALIZER;
        if (known && item.wire != WIRE_BYTES) {
            status = broken(&walk);
            goto out;
        }
        if (item.number == MODEL_PIECE)
            SIDA_TRY(check_piece(&walk, item.body));
        else if (item.number == MODEL_TRAINER)
            SIDA_TRY(check_trainer(&walk, item.body));
        else if (item.number == MODEL_NORMALIZER || item.number == MODEL_DENORMALIZER)
            SIDA_TRY(check_normalizer(&walk, item.number, item.body));
    }
    if (walk.model_type != 1 && walk.model_type != 2)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: model type %llu is neither unigram nor bpe", name,
                  (unsigned long long)walk.model_type);
    if (walk.ordinary == 0 || walk.unknown != 1)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %d pieces with %d ordinary and %d unknown ones", name,
                  walk.pieces, walk.ordinary, walk.unknown);
    *out = walk.out.data;
    *out_bytes = walk.out.used;
    walk.out.data = NULL;
out:
    free(walk.out.data);
    return status;
}
