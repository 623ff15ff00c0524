"""The parts of trainer/README.md that are made from results/: {name: Markdown}, and putting them
there. A part stands between the lines <!-- NAME: begin --> and <!-- NAME: end -->."""

import json
import os
import re

import fidelity_tables
import predictor_tables as tables
import topk_tables
from tables import markdown


def table(made):
    head, lines = made
    return markdown(head, lines) if lines else ""


def read(folder, name):
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def by_set(results):
    parts = []
    for name in results["runs"]:
        parts += [tables.settings(results, name), table(tables.in_domain(results, name))]
    return "\n".join(parts)


def sections(results, folder):
    """results: of predictor_tables.load; what is not measured is left out."""
    found = {"sources": by_set(results)}
    made = [tables.decoders, tables.torch, tables.shift, tables.margins, tables.alphas]
    made += [tables.calibration, tables.refinement, tables.shares]
    made += [tables.trainings, tables.sweep, tables.sizes]
    found |= {make.__name__: table(make(results)) for make in made}
    fidelity = read(folder, "fidelity.json")
    if fidelity:
        tasks = fidelity["tasks"].items()
        found["fidelity"] = "\n".join(fidelity_tables.table(task, runs) for task, runs in tasks)
    topk = read(folder, "train-topk.json")
    if topk:
        found["topk"] = topk_tables.table(topk)
    return {name: text for name, text in found.items() if text}


def fill(path, texts):
    """Parts of other names stay as they are."""
    with open(path, encoding="utf-8") as file:
        old = file.read()
    filled = []

    def put(match):
        name = match[1]
        if name not in texts:
            return match[0]
        filled.append(name)
        return f"<!-- {name}: begin -->\n{texts[name]}<!-- {name}: end -->"

    new = re.sub(r"<!-- ([\w-]+): begin -->\n.*?<!-- \1: end -->", put, old, flags=re.S)
    if not filled:
        raise ValueError(f"{path}: has no line <!-- NAME: begin --> of {', '.join(texts)}")
    with open(path, "w", encoding="utf-8") as file:
        file.write(new)
