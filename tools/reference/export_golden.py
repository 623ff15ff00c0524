#!/usr/bin/env python3
"""Writes tests/unit/golden/predictor*_outputs.safetensors: what PyTorch says of exported predictors.

Loads each tests/unit/golden/predictor*.safetensors (written by predictor_export_test with the argument
"write", from a fixed seed) with sida_predictor.py, and runs it over random embeddings and sequences of
different lengths; one with a refinement also given random experts of the MoE layers before the last.
Integers are stored as F32. Needs: torch (CPU), safetensors.
"""
import os

import torch
from safetensors.torch import save_file

from sida_predictor import Predictor

here = os.path.dirname(os.path.abspath(__file__))
folder = os.path.join(here, "../../tests/unit/golden")
torch.set_num_threads(1)
for name in ("predictor", "predictor_softmax", "predictor_none", "predictor_transformer", "predictor_refine",
             "predictor_transformer_refine"):
    torch.manual_seed(5)
    net = Predictor(os.path.join(folder, f"{name}.safetensors"))
    c = net.config
    table = torch.randn(c["vocabulary"], c["d_model"])
    lengths = [(7, 3), (1, 1), (12, 5), (4, 2)]
    sides = [[torch.randint(0, c["vocabulary"], (pair[side],)) for pair in lengths] for side in (0, 1)]
    logits = [[], []]
    with torch.no_grad():
        for source, target in zip(*sides):
            for into, values in zip(logits, net(table[source], table[target])):
                into.append(values)
    out = {"embedding": table}
    for i, side in enumerate(("encoder", "decoder")):
        out[f"{side}.offsets"] = torch.tensor([0] + [len(ids) for ids in sides[i]]).cumsum(0).float()
        out[f"{side}.tokens"] = torch.cat(sides[i]).float()
        out[f"{side}.logits"] = torch.cat(logits[i])
    if name.endswith("_refine"):
        chosen = [[torch.rand(len(ids), c[f"layers_{side}"] - 1, c["experts"]).topk(2)[1] for ids in of]
                  for side, of in zip(("encoder", "decoder"), sides)]
        for i, side in enumerate(("encoder", "decoder")):
            out[f"{side}.chosen"] = torch.cat(chosen[i]).float()
            for layer in range(c[f"layers_{side}"] - 1):
                known = [[None] * len(lengths), [None] * len(lengths)]
                known[i] = [x[:, :layer + 1] for x in chosen[i]]
                refined = [net(table[source], table[target], pair)[i].detach()
                           for source, target, *pair in zip(*sides, *known)]
                out[f"{side}.refined{layer}"] = torch.cat(refined)
    path = os.path.join(folder, f"{name}_outputs.safetensors")
    save_file({k: v.contiguous() for k, v in out.items()}, path)
    print(path, os.path.getsize(path), "bytes; largest logit", max(float(torch.cat(v).abs().max()) for v in logits))
