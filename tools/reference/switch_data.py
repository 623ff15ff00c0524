"""What the sample model is trained on: prose with spans to fill in, and tasks as text to text."""

from __future__ import annotations

import csv
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from switch_model import EOS

FIRST_SENTINEL = 32099

# The part of the corpus that no training step sees: two novels, which follow one another in
# their file, and one block in HELD_OUT_EVERY of everything else.
HELD_OUT = "deb_janeaustenr:No one who had ever seen Catherine:It is a truth universally"
HELD_OUT_EVERY = 50
REPEAT = {"nltk_movie_reviews": 2}  # corpora that count more than once: the tasks are reviews


@dataclass
class Task:
    """A data set as text to text; `positive` is the class whose F1 is reported."""

    positive: str
    length: int  # source tokens while training
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.test})

    def constant(self) -> dict[str, float]:
        share = sum(label == self.positive for _, label in self.test) / len(self.test)
        return {"accuracy": 100 * max(share, 1 - share), "f1": 100 * 2 * share / (1 + share)}


def read_tasks(root: Path) -> dict[str, Task]:
    def lines(name: str) -> list[str]:
        with gzip.open(root / name, "rt", encoding="utf-8-sig") as f:
            return [line.rstrip("\r\n") for line in f]

    def sst2(name: str):
        return [
            (
                f"sst2 sentence: {row['sentence'].strip()}",
                ("negative", "positive")[int(row["label"])],
            )
            for row in csv.DictReader(lines(name), delimiter="\t", quoting=csv.QUOTE_NONE)
        ]

    def mrpc(name: str):
        return [
            (
                f"mrpc sentence1: {r[3]} sentence2: {r[4]}",
                ("not_equivalent", "equivalent")[int(r[0])],
            )
            for r in (line.split("\t") for line in lines(name))
        ]

    def multirc(name: str):
        passages = [json.loads(line)["passage"] for line in lines(name)]
        return [
            (
                f"multirc question: {q['question']} answer: {a['text']} paragraph: {p['text']}",
                ("False", "True")[a["label"]],
            )
            for p in passages
            for q in p["questions"]
            for a in q["answers"]
            if "label" in a
        ]

    return {
        "sst2": Task("positive", 64, sst2("sst2/train.tsv.gz"), sst2("sst2/dev.tsv.gz")),
        "mrpc": Task(
            "equivalent",
            128,
            mrpc("mrpc/msr_paraphrase_train.txt.gz"),
            mrpc("mrpc/msr_paraphrase_test.txt.gz"),
        ),
        "multirc": Task(
            "True", 512, multirc("multirc/train.jsonl.gz"), multirc("multirc/val.jsonl.gz")
        ),
    }


def set_sentences_aside(rows: list[tuple[str, str]], share: float, seed: int):
    """SST-2's training set holds whole sentences and phrases cut from them. Sets a share of the
    whole sentences aside with every phrase of three words or more that occurs in them.
    Returns (rows to train on, rows set aside, how many of these are whole sentences)."""

    def phrases(words: list[str]):
        return (
            " ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)
        )

    words = {source: source.split()[2:] for source, _ in rows}
    covered: set[str] = set()
    whole = []
    for source in sorted(words, key=lambda s: (-len(words[s]), s)):
        if " ".join(words[source]) not in covered:
            whole.append(source)
            covered.update(phrases(words[source]))
    pick = np.random.default_rng(seed).permutation(len(whole))[: max(1, round(share * len(whole)))]
    chosen = {whole[i] for i in pick}
    inside = set().union(*(phrases(words[source]) for source in chosen))
    aside = [
        r
        for r in rows
        if r[0] in chosen or (len(words[r[0]]) > 2 and " ".join(words[r[0]]) in inside)
    ]
    taken = set(aside)
    return [r for r in rows if r not in taken], aside, len(chosen)


def read_corpus(root: Path, hold_out: str, spm) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tokens to train on, and those held out ("novels", "other"). Blocks are 16 paragraphs; every
    second one that is trained on is written as SST-2 is: lower case, punctuation apart."""
    held_file, start, end = hold_out.split(":")
    train, novels, other = [], [], []
    for path in sorted((root / "corpus").glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as f:
            lines = [line.strip() for line in f if line.strip()]
        if path.name.startswith(held_file):
            first = next(i for i, line in enumerate(lines) if re.match(start, line))
            last = next(i for i, line in enumerate(lines) if i > first and re.match(end, line))
            novels += lines[first:last]
            del lines[first:last]
        for i in range(0, len(lines), 16):
            block = " ".join(lines[i : i + 16])
            if i // 16 % HELD_OUT_EVERY == HELD_OUT_EVERY // 2:
                other.append(block)
            else:
                train += [block] * REPEAT.get(path.name.removesuffix(".txt.gz"), 1)
    train = [
        re.sub(r"([^\w\s])", r" \1 ", text).lower() if i % 2 else text
        for i, text in enumerate(train)
    ]

    def tokens(texts: list[str]) -> np.ndarray:
        return np.concatenate(
            [np.asarray(ids, np.int64) for ids in spm.encode(texts, num_threads=16)]
        )

    return tokens(train), {"novels": tokens(novels), "other": tokens(other)}


def corrupt(row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """T5's objective: 15 % of the tokens in spans of 1 to 5. Starts lie on a grid of 6, so spans
    never touch."""
    count = max(1, round(len(row) * 0.15 / 3))
    start = 6 * np.sort(rng.choice(len(row) // 6, count, replace=False))
    width = rng.integers(1, 6, count)
    noise = np.zeros(len(row), bool)
    for s, w in zip(start, width):
        noise[s : s + w] = True
    sentinel = FIRST_SENTINEL - np.arange(count)
    src, keep = row.copy(), ~noise
    src[start], keep[start] = sentinel, True
    tgt = np.insert(row[noise], np.cumsum(width) - width, sentinel)
    return np.append(src[keep], EOS), np.concatenate([tgt, [FIRST_SENTINEL - count, EOS]])


def pad(rows: list, length: int | None = None) -> Tensor:
    """[N, length] token ids, cut or padded; `length` defaults to the longest row."""
    out = np.zeros((len(rows), length or max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row[: out.shape[1]]
    return torch.from_numpy(out)


SPAN_SOURCE, SPAN_TARGET, LABEL_TARGET = 256, 72, 8
MIX = (
    "sst2",
    "spans",
    "sst2",
    "mrpc",
    "sst2",
    "spans",
    "sst2",
    "spans",
    "sst2",
    "multirc",
    "sst2",
    "spans",
)


class Batches(IterableDataset):
    """An endless stream of (kind, src, tgt). `kinds` is walked in turn, by all workers together."""

    def __init__(
        self, kinds, tokens, encoded, lengths, batch_tokens: int, word_dropout: float, seed: int
    ):
        self.kinds, self.tokens, self.encoded, self.lengths = kinds, tokens, encoded, lengths
        self.batch_tokens, self.word_dropout, self.seed = batch_tokens, word_dropout, seed

    def spans(self, rng: np.random.Generator):
        starts = rng.integers(0, len(self.tokens) - SPAN_SOURCE, self.batch_tokens // SPAN_SOURCE)
        src, tgt = zip(*(corrupt(self.tokens[s : s + SPAN_SOURCE - 1], rng) for s in starts))
        return pad(src, SPAN_SOURCE), pad(tgt, SPAN_TARGET)

    def task(self, kind: str, rng: np.random.Generator):
        rows, length = self.encoded[kind], self.lengths[kind]
        picked = [rows[i] for i in rng.integers(0, len(rows), self.batch_tokens // length)]
        src = pad([row[: length - 1] + [EOS] for row, _ in picked], length)
        # A sentinel in place of a token says what it says in the spans: something is missing here.
        missing = torch.from_numpy(rng.random(src.shape) < self.word_dropout) & (src > EOS)
        return src.masked_fill_(missing, FIRST_SENTINEL), pad(
            [label for _, label in picked], LABEL_TARGET
        )

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, step = (info.id, info.num_workers) if info else (0, 1)
        rng = np.random.default_rng((self.seed, len(self.kinds), worker))
        while True:
            kind = self.kinds[worker % len(self.kinds)]
            yield (kind, *(self.spans(rng) if kind == "spans" else self.task(kind, rng)))
            worker += step
