#!/usr/bin/env python3
"""The GPU side of `tools/bench/gpu --parts predictor`: a predictor of sida's sizes in PyTorch.

The network of runtime/predictor/net.h, random parameters: compress + ReLU, a 2-layer LSTM (cuDNN),
sparsemax attention over its output plus a residual, one linear for all heads; the decoder's trunk,
which also attends to the encoder's, for the start token. With --kind transformer the other network,
of three blocks; its biases of relative positions are looked up once. Then the --top-k best experts a token and
layer with their factors. Timed is what a hash table costs: from token ids in host memory to ids and
factors in host memory, since that is where the expert store plans; the input embedding lies on the
device. Twice: as PyTorch issues it, and replayed as a CUDA graph, where the host issues one launch;
a runtime of our own on cuDNN would lie between. Prints JSON lines, one a length and way.

  tools/bench/predictor_torch.py --experts 128 --lengths 25 60 300
"""

import argparse
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, MOE_LAYERS, LSTM_LAYERS = 32128, 6, 2
BLOCKS, HEAD_WIDTH, BUCKETS, DISTANCE, EPSILON = 3, 32, 32, 128, 1e-6


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


def buckets(length, device):
    """T5's, in both directions: [length, length]."""
    relative = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
    half, exact, distance = BUCKETS // 2, BUCKETS // 4, relative.abs()
    far = (distance.clamp(min=1) / exact).log() / math.log(DISTANCE / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


class Attention(nn.Module):
    def __init__(self, hidden, cross):
        super().__init__()
        self.norm = nn.RMSNorm(hidden, EPSILON)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key_value = nn.Linear(hidden, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.cross, self.positions = cross, nn.Parameter(torch.randn(BUCKETS, hidden // HEAD_WIDTH))
        self.bias = {}

    def forward(self, x, memory=None):
        normed, bias = self.norm(x), None
        if not self.cross:
            if x.shape[1] not in self.bias:
                places = buckets(x.shape[1], x.device)
                self.bias[x.shape[1]] = self.positions[places].permute(2, 0, 1).contiguous()
            bias = self.bias[x.shape[1]]
        keys, values = self.key_value(memory if self.cross else normed).chunk(2, -1)
        heads = (self.query(normed), keys, values)
        q, k, v = (t.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for t in heads)
        mixed = F.scaled_dot_product_attention(q, k, v, bias)
        return x + self.output(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, d_model, hidden, experts, decoder):
        super().__init__()
        self.experts, norm = experts, lambda width: nn.RMSNorm(width, EPSILON)
        self.norm_in, self.compress = norm(d_model), nn.Linear(d_model, hidden)
        self.self_attention = nn.ModuleList(Attention(hidden, False) for _ in range(BLOCKS))
        self.cross_attention = nn.ModuleList(
            Attention(hidden, True) for _ in range(BLOCKS if decoder else 0)
        )
        self.feed_forward = nn.ModuleList(
            nn.Sequential(
                norm(hidden),
                nn.Linear(hidden, 2 * hidden, bias=False),
                nn.ReLU(),
                nn.Linear(2 * hidden, hidden, bias=False),
            )
            for _ in range(BLOCKS)
        )
        self.norm_memory = norm(hidden) if decoder else None
        self.norm_out, self.heads = norm(hidden), nn.Linear(hidden, MOE_LAYERS * experts)

    def forward(self, embedded, memory=None):
        x = self.compress(self.norm_in(embedded))
        memory = None if memory is None else self.norm_memory(memory)
        for block in range(BLOCKS):
            x = self.self_attention[block](x)
            if memory is not None:
                x = self.cross_attention[block](x, memory)
            x = x + self.feed_forward[block](x)
        return self.heads(self.norm_out(x)).unflatten(-1, (MOE_LAYERS, self.experts)), x


class Predictor(nn.Module):
    def __init__(self, kind, d_model, experts, top_k):
        super().__init__()
        hidden = (d_model + 191) // 192 * 64  # sida_net_default_hidden
        self.top_k = top_k
        self.embedding = nn.Embedding(VOCABULARY, d_model, dtype=torch.bfloat16)
        if kind == "transformer":
            self.encoder = Transformer(d_model, hidden, experts, False)
            self.decoder = Transformer(d_model, hidden, experts, True)
        else:
            self.encoder = Trunk(d_model, hidden, experts)
            self.decoder = Trunk(d_model, hidden, experts)

    def table(self, logits):
        alpha, experts = logits.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return experts.to(torch.int16).flatten(), alpha.flatten()

    def forward(self, ids, start):
        dtype = self.encoder.compress.weight.dtype
        logits, memory = self.encoder(self.embedding(ids).to(dtype))
        first, _ = self.decoder(self.embedding(start).to(dtype), memory)
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
        "network": args.kind,
        "weights": args.weights,
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
    parser.add_argument("--kind", choices=["lstm", "transformer"], default="lstm")
    parser.add_argument("--weights", choices=["f32", "bf16"], default="f32", help="a Transformer's")
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
        model = Predictor(args.kind, args.d_model, args.experts, args.top_k).to(device).eval()
        if args.kind == "lstm":
            model.encoder.lstm.flatten_parameters()
            model.decoder.lstm.flatten_parameters()
        elif args.weights == "bf16":
            model = model.bfloat16()
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
