extern "C" {
#include "formats/tokenizer.h"
#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "formats/base/text.h"
#include "formats/spiece.h"
}

#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <sentencepiece_processor.h>
#include <string>
#include <string_view>
#include <vector>

namespace {

constexpr int kExtraIds = 100;
constexpr std::string_view kExtraHead = "<extra_id_";
/* A line of a corpus has at most 16 MiB. */
constexpr size_t kMaxTextBytes = size_t(64) << 20;

} // namespace

struct sida_tokenizer {
    sentencepiece::SentencePieceProcessor model;
    sida_fingerprint fingerprint;
    int32_t pieces, unk;
    int32_t eos, pad; /* -1: the model has no such piece */
};

namespace {

/* Python's str.isspace(), which decides what <extra_id_N> swallows around itself. */
bool is_space(char32_t c) {
    return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
           c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

/* The code point at text[0] (well-formed UTF-8) and its length. */
char32_t code_point(std::string_view text, size_t *bytes) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
    *bytes = byte(0) < 0x80 ? 1 : byte(0) < 0xe0 ? 2 : byte(0) < 0xf0 ? 3 : 4;
    char32_t c = *bytes == 1 ? byte(0) : byte(0) & (0x7f >> *bytes);
    for (size_t i = 1; i < *bytes; i++) c = c << 6 | (byte(i) & 0x3f);
    return c;
}

std::string_view strip_front(std::string_view text) {
    size_t bytes;
    while (!text.empty() && is_space(code_point(text, &bytes))) text.remove_prefix(bytes);
    return text;
}

std::string_view strip_back(std::string_view text) {
    while (!text.empty()) {
        size_t start = text.size() - 1, bytes;
        while ((static_cast<unsigned char>(text[start]) & 0xc0) == 0x80) start--;
        if (!is_space(code_point(text.substr(start), &bytes))) break;
        text = text.substr(0, start);
    }
    return text;
}

/* The special token that `text` begins with: its id and length, or -1. */
int32_t special_at(const sida_tokenizer &tokenizer, std::string_view text, size_t *bytes,
                   bool *strips) {
    const struct {
        std::string_view name;
        int32_t id;
    } named[] = {{"</s>", tokenizer.eos}, {"<pad>", tokenizer.pad}, {"<unk>", tokenizer.unk}};
    *strips = false;
    for (const auto &special : named)
        if (special.id >= 0 && text.substr(0, special.name.size()) == special.name) {
            *bytes = special.name.size();
            return special.id;
        }
    if (text.substr(0, kExtraHead.size()) != kExtraHead) return -1;
    size_t i = kExtraHead.size(), first = i;
    int number = 0;
    while (i < text.size() && i < first + 2 && text[i] >= '0' && text[i] <= '9')
        number = 10 * number + (text[i++] - '0');
    if (i == first || i >= text.size() || text[i] != '>' || (i == first + 2 && text[first] == '0'))
        return -1;
    *bytes = i + 1;
    *strips = true;
    return tokenizer.pieces + kExtraIds - 1 - number;
}

sida_status append_plain(const sida_tokenizer &tokenizer, std::string_view text,
                         std::vector<int> &ids) {
    if (text.empty()) return SIDA_OK;
    std::vector<int> part;
    const auto result = tokenizer.model.Encode(absl::string_view(text.data(), text.size()), &part);
    if (!result.ok())
        return sida_fail(SIDA_ERROR_FORMAT, "the tokenizer cannot encode a text: %s",
                         result.error_message());
    ids.insert(ids.end(), part.begin(), part.end());
    return SIDA_OK;
}

sida_status encode_all(const sida_tokenizer &tokenizer, std::string_view text,
                       std::vector<int> &ids) {
    size_t begin = 0;
    bool after_strip = false;
    for (size_t at = text.find('<'); at != text.npos; at = text.find('<', at)) {
        size_t bytes;
        bool strips;
        int32_t id = special_at(tokenizer, text.substr(at), &bytes, &strips);
        if (id < 0) {
            at++;
            continue;
        }
        std::string_view before = text.substr(begin, at - begin);
        if (after_strip) before = strip_front(before);
        if (strips) before = strip_back(before);
        sida_status status = append_plain(tokenizer, before, ids);
        if (status != SIDA_OK) return status;
        ids.push_back(id);
        after_strip = strips;
        begin = at += bytes;
    }
    std::string_view rest = text.substr(begin);
    return append_plain(tokenizer, after_strip ? strip_front(rest) : rest, ids);
}

/* Appends a word of its own, with one space in front of it unless it is the first. */
void append_word(std::string &text, std::string_view word) {
    while (!word.empty() && word.back() == ' ') word.remove_suffix(1);
    if (word.empty()) return;
    if (!text.empty()) text += ' ';
    text += word;
}

sida_status flush_run(const sida_tokenizer &tokenizer, std::vector<int> &run, std::string &text) {
    if (run.empty()) return SIDA_OK;
    std::string words;
    const auto result = tokenizer.model.Decode(run, &words);
    run.clear();
    if (!result.ok())
        return sida_fail(SIDA_ERROR_FORMAT, "the tokenizer cannot decode ids: %s",
                         result.error_message());
    append_word(text, words);
    return SIDA_OK;
}

sida_status decode_all(const sida_tokenizer &tokenizer, const int32_t *ids, size_t count,
                       std::string &text) {
    std::vector<int> run;
    for (size_t i = 0; i < count; i++) {
        int32_t id = ids[i];
        if (id < 0) return sida_fail(SIDA_ERROR_ARGUMENT, "token id %d cannot be decoded", (int)id);
        if (id == tokenizer.pad || id == tokenizer.eos) continue;
        if (id < tokenizer.pieces && id != tokenizer.unk) {
            run.push_back(id);
            continue;
        }
        sida_status status = flush_run(tokenizer, run, text);
        if (status != SIDA_OK) return status;
        int number = tokenizer.pieces + kExtraIds - 1 - id;
        append_word(text, id == tokenizer.unk || number < 0
                              ? std::string("<unk>")
                              : std::string(kExtraHead) + std::to_string(number) + ">");
    }
    return flush_run(tokenizer, run, text);
}

/* Runs `body`, which may throw, behind the C face. */
template <typename Body> sida_status guarded(const char *name, Body body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return sida_fail(SIDA_ERROR_MEMORY, "%s: out of memory", name);
    } catch (const std::exception &error) {
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s", name, error.what());
    } catch (...) {
        return sida_fail(SIDA_ERROR_FORMAT, "%s: the tokenizer's library failed", name);
    }
}

int32_t find_piece(const sida_tokenizer &tokenizer, const char *piece) {
    int id = tokenizer.model.PieceToId(piece);
    return id >= 0 && id < tokenizer.pieces && tokenizer.model.IdToPiece(id) == piece ? id : -1;
}

} // namespace

sida_status sida_tokenizer_parse(sida_tokenizer **out, const void *data, size_t size,
                                 const char *name) {
    uint8_t *checked = nullptr;
    size_t bytes;
    *out = nullptr;
    sida_status status = sida_spiece_check(&checked, &bytes, data, size, name);
    if (status != SIDA_OK) return status;
    sida_tokenizer *tokenizer = nullptr;
    status = guarded(name, [&]() -> sida_status {
        tokenizer = new sida_tokenizer();
        const auto result = tokenizer->model.LoadFromSerializedProto(
            absl::string_view(reinterpret_cast<const char *>(checked), bytes));
        if (!result.ok())
            return sida_fail(SIDA_ERROR_FORMAT, "%s: %s", name, result.error_message());
        tokenizer->pieces = tokenizer->model.GetPieceSize();
        tokenizer->unk = tokenizer->model.unk_id();
        tokenizer->eos = find_piece(*tokenizer, "</s>");
        tokenizer->pad = find_piece(*tokenizer, "<pad>");
        tokenizer->fingerprint = sida_fingerprint_of(data, size);
        return SIDA_OK;
    });
    free(checked);
    if (status == SIDA_OK)
        *out = tokenizer;
    else
        delete tokenizer;
    return status;
}

sida_status sida_tokenizer_open(sida_tokenizer **out, const char *path) {
    char *data;
    size_t size;
    *out = nullptr;
    sida_status status = sida_file_read(&data, &size, path, SIDA_SPIECE_MAX_BYTES);
    if (status != SIDA_OK) return status;
    status = sida_tokenizer_parse(out, data, size, path);
    free(data);
    return status;
}

void sida_tokenizer_destroy(sida_tokenizer *tokenizer) {
    delete tokenizer;
}

sida_status sida_tokenizer_encode(int32_t **ids, size_t *count, const sida_tokenizer *tokenizer,
                                  const char *text, size_t bytes) {
    *ids = nullptr;
    *count = 0;
    if (bytes > kMaxTextBytes || !sida_text_is_utf8(text, bytes))
        return sida_fail(SIDA_ERROR_FORMAT,
                         "a text of %zu bytes is no UTF-8 without NUL bytes, or "
                         "more than the limit of %zu",
                         bytes, kMaxTextBytes);
    return guarded("encoding a text", [&]() -> sida_status {
        std::vector<int> found;
        sida_status status = encode_all(*tokenizer, std::string_view(text, bytes), found);
        if (status != SIDA_OK) return status;
        status = SIDA_ALLOC(ids, found.size(), "token ids");
        if (status != SIDA_OK) return status;
        for (size_t i = 0; i < found.size(); i++) (*ids)[i] = found[i];
        *count = found.size();
        return SIDA_OK;
    });
}

sida_status sida_tokenizer_decode(char **text, const sida_tokenizer *tokenizer, const int32_t *ids,
                                  size_t count) {
    *text = nullptr;
    return guarded("decoding ids", [&]() -> sida_status {
        std::string words;
        sida_status status = decode_all(*tokenizer, ids, count, words);
        return status == SIDA_OK ? sida_strdup(text, words.c_str()) : status;
    });
}

int32_t sida_tokenizer_pieces(const sida_tokenizer *tokenizer) {
    return tokenizer->pieces;
}

sida_fingerprint sida_tokenizer_fingerprint(const sida_tokenizer *tokenizer) {
    return tokenizer->fingerprint;
}
