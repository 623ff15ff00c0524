#!/usr/bin/env python3
"""The GPU side of `tools/bench/gpu --parts predictor`: a predictor of sida's sizes in PyTorch.

The network of runtime/predictor/net.h, random parameters: compress + ReLU, a 2-layer LSTM (cuDNN),
sparsemax attention over its output plus a residual, one linear for all heads; the decoder's trunk,
which also attends to the encoder's, for the start token. Then the --top-k best experts a token and
layer with their factors. Timed is what a hash table costs: from token ids in host memory to ids and
factors in host memory, since that is where the expert store plans; the input embedding lies on the
device. Twice: as PyTorch issues it, and replayed as a CUDA graph, where the host issues one launch;
a runtime of our own on cuDNN would lie between. Prints JSON lines, one a length and way.

  tools/bench/predictor_torch.py --experts 128 --lengths 25 60 300
"""

import argparse
import json
import sys
import time

import torch
from torch import nn

VOCABULARY, MOE_LAYERS, LSTM_LAYERS = 32128, 6, 2


def sparsemax(scores):
    """Martins and Astudillo 2016 over the last dimension."""
    high = scores.sort(dim=-1, descending=True).values
    sums = high.cumsum(dim=-1) - 1
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    support = (high * count > sums).sum(dim=-1, keepdim=True)
    threshold = sums.gather(-1, support - 1) / support
    return (scores - threshold).clamp(min=0)


class Trunk(nn.Module):
    def __init__(self, d_model, hidden, experts):
        super().__init__()
        self.experts = experts
        self.compress = nn.Linear(d_model, hidden)
        self.lstm = nn.LSTM(hidden, hidden, LSTM_LAYERS, batch_first=True)
        self.residual = nn.Linear(hidden, hidden)
        self.heads = nn.Linear(hidden, MOE_LAYERS * experts)

    def forward(self, embedded, memory=None):
        """embedded: [batch, tokens, d_model]. One decoder token sees itself alone, so causality
        needs no mask here."""
        x = torch.relu(self.compress(embedded))
        h, _ = self.lstm(x)
        mixed = self.residual(x) + sparsemax(h @ h.mT) @ h
        if memory is not None:
            mixed = mixed + sparsemax(h @ memory.mT) @ memory
        return self.heads(mixed).unflatten(-1, (MOE_LAYERS, self.experts)), h


class Predictor(nn.Module):
    def __init__(self, d_model, experts, top_k):
        super().__init__()
        hidden = (d_model + 191) // 192 * 64  # sida_net_default_hidden
        self.top_k = top_k
        self.embedding = nn.Embedding(VOCABULARY, d_model, dtype=torch.bfloat16)
        self.encoder = Trunk(d_model, hidden, experts)
        self.decoder = Trunk(d_model, hidden, experts)

    def table(self, logits):
        alpha, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return experts.to(torch.int16).flatten(), alpha.flatten()

    def forward(self, ids, start):
        logits, memory = self.encoder(self.embedding(ids).float())
        first, _ = self.decoder(self.embedding(start).float(), memory)
        tables = [self.table(logits), self.table(first)]
        return torch.cat([t[0] for t in tables]), torch.cat([t[1] for t in tables])


class Run:
    """One batch from ids on the host to tables on the host; pinned on both ends."""

    def __init__(self, model, batch, length, device, graph):
        pin = device.type == "cuda"
        self.model, self.device, self.graph = model, device, None
        self.host_ids = torch.zeros(batch, length, dtype=torch.long, pin_memory=pin)
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.start = torch.zeros(batch, 1, dtype=torch.long, device=device)
        experts, alpha = model(self.ids, self.start)
        self.host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for t in (experts, alpha)]
        if graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    model(self.ids, self.start)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.tables = model(self.ids, self.start)

    def once(self, ids):
        self.host_ids.copy_(ids)
        self.ids.copy_(self.host_ids, non_blocking=True)
        if self.graph:
            self.graph.replay()
        else:
            self.tables = self.model(self.ids, self.start)
        for to, table in zip(self.host, self.tables):
            to.copy_(table, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(args, model, length, device, graph):
    run = Run(model, args.batch, length, device, graph)
    generator = torch.Generator().manual_seed(7)
    samples = []
    for i in range(args.warmup + args.runs):
        ids = torch.randint(3, VOCABULARY, (args.batch, length), generator=generator)
        begin = time.perf_counter()
        run.once(ids)
        if i >= args.warmup:
            samples.append((time.perf_counter() - begin) * 1e3)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "kind": "row",
        "device": name,
        "way": "graph" if graph else "eager",
        "d_model": args.d_model,
        "experts": args.experts,
        "batch": args.batch,
        "length": length,
        "top_k": args.top_k,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "samples_ms": samples,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 60, 300])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    failed = 0
    with torch.inference_mode():
        model = Predictor(args.d_model, args.experts, args.top_k).to(device).eval()
        model.encoder.lstm.flatten_parameters()
        model.decoder.lstm.flatten_parameters()
        for length in args.lengths:
            for graph in [False, True] if device.type == "cuda" else [False]:
                try:
                    line = measure(args, model, length, device, graph)
                except Exception as error:  # a cuDNN that cannot be captured, say
                    failed += 1
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    line = {"kind": "failed", "length": length, "failed": reason}
                print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
