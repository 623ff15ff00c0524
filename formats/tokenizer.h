/* SentencePiece with T5's extra ids, behind a C face. Safe to share between threads once open.
 * T5 layout: ids 0 … P-1 are the model's pieces; <extra_id_i> = vocab_top - i where
 * vocab_top = P + 99 (100 extra ids): with 32,000 pieces <extra_id_0> = 32099. */
#ifndef SIDA_FORMATS_TOKENIZER_H
#define SIDA_FORMATS_TOKENIZER_H

#include "formats/base/fingerprint.h"
#include "formats/base/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sida_tokenizer sida_tokenizer;

/* Errors: IO, FORMAT (damaged or hostile model: never a crash). */
sida_status sida_tokenizer_open(sida_tokenizer **out, const char *path);
sida_status sida_tokenizer_parse(sida_tokenizer **out, const void *data, size_t size,
                                 const char *name);
void sida_tokenizer_destroy(sida_tokenizer *tokenizer);

/* Ids of `text` (UTF-8 without NUL, `bytes` long; FORMAT otherwise), as Hugging Face's slow
 * T5Tokenizer with legacy=True gives them without the final </s>: the text is cut at the literal
 * strings <extra_id_0> … <extra_id_99>, </s>, <pad> and <unk>, which become their ids; white space
 * around an extra id is dropped; each part between them is encoded by SentencePiece on its own, so
 * it begins with a word boundary. Names that the model has no piece for (<pad>, </s>) are plain
 * text. *ids: free(). */
sida_status sida_tokenizer_encode(int32_t **ids, size_t *count, const sida_tokenizer *tokenizer,
                                  const char *text, size_t bytes);

/* Text of ids. Pad and </s> are left out; extra ids are written as <extra_id_N>, the unknown id and
 * ids past the extra ids (a model's vocabulary is padded) as <unk>, each a word of its own.
 * ARGUMENT for a negative id. free(). */
sida_status sida_tokenizer_decode(char **text, const sida_tokenizer *tokenizer, const int32_t *ids,
                                  size_t count);

/* Pieces of the model file, extra ids not counted. */
int32_t sida_tokenizer_pieces(const sida_tokenizer *tokenizer);
sida_fingerprint sida_tokenizer_fingerprint(const sida_tokenizer *tokenizer);

#ifdef __cplusplus
}
#endif

#endif
