#!/usr/bin/env python3
"""Writes the golden of tests/unit/formats_tokenizer_test.c: lines {"text": ..., "ids": [...]}.

Reference: T5Tokenizer (the slow one, legacy=True) of transformers 4.57 with sentencepiece 0.2.
Usage: tokenizer_golden.py SPIECE_MODEL > tests/unit/formats_tokenizer_golden.jsonl
"""
import json
import sys

from transformers import T5Tokenizer

TEXTS = [
    "Hello world", "hello world", "", " ", "   lead and trail   ", "a  b   c", "tabs\tand\nnewlines\r\n",
    "sst2 sentence: it 's a charming and often affecting journey . ",
    "a <extra_id_0> b", "a<extra_id_0>b", "<extra_id_5>  x", " <extra_id_0> <extra_id_1> ",
    "<extra_id_99>,<extra_id_9>", "<extra_id_100>", "<extra_id_00>", "<extra_id_>", "<extra_id_0",
    "<EXTRA_ID_0>", "<<extra_id_3>>", "x </s> y", "a </s></s> b", "</s>", "<pad>a", "x <unk> y", "<s> x",
    "é\u0301 ﬁ ½ ①", "naïve café Ünïcödé", "日本語のテキスト", "emoji 😀😃 done", "мир العالم",
    "a\u00a0b\u3000c\u200bd\ufeffe", "<extra_id_1>\u2028x\u0085<extra_id_2>\u00a0",
    "x\u001c<extra_id_7>\u001f y", "\u2581already \u2581marked", "ﷺ", "\U0001d573\U0001d58a",
    "12345678901234567890 3.14159 1e-10", "http://example.org/?q=a&b=c#d", "don't can't won't",
    "word " * 60, "pneumonoultramicroscopicsilicovolcanoconiosis" * 3, "\U000f0000\U0010ffff",
]


def main():
    tokenizer = T5Tokenizer(sys.argv[1], legacy=True)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        print(json.dumps({"text": text, "ids": ids}, ensure_ascii=True))


if __name__ == "__main__":
    main()
