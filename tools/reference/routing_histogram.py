#!/usr/bin/env python3
"""Writes runtime/model/routing_histogram.h: how unevenly a trained model uses its experts.

Reads a trace of `sida trace` and prints the share of tokens that each expert of a
MoE layer takes, sorted within the layer, averaged over all MoE layers by rank.
The committed table is the bundled sample's over its held-out prose:

    sida trace --model data/sample/model --format text \\
        --input data/sample/inputs/prose-test.txt --output prose.h5
    tools/reference/routing_histogram.py prose.h5 \\
        'the bundled sample over prose-test.txt' >runtime/model/routing_histogram.h

Needs: h5py, numpy.
"""
import argparse
import sys

import h5py
import numpy as np


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("source", help="what was traced, for the comment")
    args = parser.parse_args()
    rows, tokens = [], {}
    with h5py.File(args.trace, "r") as trace:
        experts = int(trace.attrs["experts"])
        for side in ("encoder", "decoder"):
            if f"{side}/experts" not in trace:
                continue
            chosen = trace[f"{side}/experts"][:, :, 0]
            tokens[side] = len(chosen)
            for layer in range(chosen.shape[1]):
                counts = np.bincount(chosen[:, layer], minlength=experts)
                rows.append(np.sort(counts)[::-1] / counts.sum())
    shares = np.mean(rows, axis=0)
    counted = ", ".join(f"{n} {side} tokens" for side, n in tokens.items())
    out = sys.stdout
    print("/* Made by tools/reference/routing_histogram.py: shares of top-1 choices by rank, mean over",
          file=out)
    print(f" * {len(rows)} MoE layers of {args.source}:\n * {counted}. */", file=out)
    print("#ifndef SIDA_RUNTIME_MODEL_ROUTING_HISTOGRAM_H", file=out)
    print("#define SIDA_RUNTIME_MODEL_ROUTING_HISTOGRAM_H\n", file=out)
    print(f"enum {{ SIDA_ROUTING_RANKS = {experts} }};\n", file=out)
    print("/* clang-format off */", file=out)
    print("static const double sida_routing_shares[SIDA_ROUTING_RANKS] = {", file=out)
    for first in range(0, experts, 8):
        print("    " + ", ".join(f"{s:.6f}" for s in shares[first:first + 8]) + ",", file=out)
    print("};\n/* clang-format on */\n\n#endif", file=out)


main()
