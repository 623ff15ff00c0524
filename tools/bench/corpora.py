"""The data that predictors are trained on and measured on, in parts that never meet."""

import glob
import gzip
import os
import random

PARTS = ["train", "valid", "test"]


def lines_of(folder, name):
    """Lines of a file that may be packed."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        path += ".gz"
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        return [line.rstrip("\r\n") for line in file]


def sst2(folder, rows, held):
    """{part: lines with the head}: the first rows of train, its last `held`, and dev."""
    head, *lines = lines_of(os.path.join(folder, "sst2"), "train.tsv")
    dev = lines_of(os.path.join(folder, "sst2"), "dev.tsv")[1:]
    parts = {"train": lines[:-held][:rows], "valid": lines[-held:], "test": dev}
    return {part: [head, *found] for part, found in parts.items()}


def without_novels(name, lines):
    """The two novels that the sample model's training left out are of one author: not used here."""
    if not name.startswith("deb_janeaustenr"):
        return lines

    def find(start, after):
        places = (i for i in range(after, len(lines)) if lines[i].startswith(start))
        return next(places, len(lines))

    first = find("No one who had ever seen Catherine", 0)
    return lines[:first] + lines[find("It is a truth universally", first) :]


def prose(folder, every=1):
    """{part: blocks of 16 lines} of every corpus/*.txt, shuffled; one in `every` to train on. Block
    25 of every 50 was never seen by the sample model."""
    parts = {part: [] for part in PARTS}
    paths = sorted(glob.glob(os.path.join(folder, "corpus", "*.txt*")))
    if not paths:
        raise ValueError(f"{folder}/corpus: has no *.txt or *.txt.gz")
    for path in paths:
        lines = [line.strip() for line in lines_of(*os.path.split(path)) if line.strip()]
        lines = without_novels(os.path.basename(path), lines)
        for i in range(0, len(lines), 16):
            text = " ".join(lines[i : i + 16]).replace("\0", "")
            place = i // 16 % 50
            part = "test" if place == 25 else "valid" if place == 10 else "train"
            if part != "train" or place % every == 1 % every:
                parts[part].append(text)
    for texts in parts.values():
        random.Random(0).shuffle(texts)  # of all corpora, also where only some rows are taken
    return parts
