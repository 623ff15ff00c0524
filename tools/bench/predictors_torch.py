#!/usr/bin/env python3
"""A predictor trained in PyTorch on the traces that `sida train` gets, for tools/bench/predictors.

  --kind lstm         the network and the losses of trainer_torch.py, which are the trainer's: with
                      the paper's settings its hit rates are to be those of `sida train`
  --kind transformer  the ceiling: a wide Transformer (pre-norm, T5's relative positions, GELU,
                      dropout), whose decoder is causal and has cross-attention

Options, defaults, schedule, batches (another order of the same sequences) and the choice of the
epoch by the hit@1 of --valid's content tokens are `sida train`'s. Traces lie on the device; a batch
is padded to a multiple of 16 tokens, all padding masked. On a GPU a step is a CUDA graph, one for
each pair of padded lengths, with TF32.

--predict TRACE=OUT writes a copy of TRACE in which the network's predictions stand in place of the
routing. `sida eval` takes that in a predictor's place, so it is measured as all others are. Prints
JSON, with the hit rates of these traces as PyTorch counts them; the curve goes to stderr.

  tools/bench/predictors_torch.py --kind transformer --trace train.h5 --valid valid.h5 \\
      --predict test.h5=out.h5
"""

import argparse
import json
import math
import sys
import time

import h5py
import torch
import torch.nn.functional as F
import trainer_torch
from torch import nn

SIDES = ("encoder", "decoder")
PAD = 16  # lengths are multiples of it
BUCKETS, DISTANCE = 32, 128
AT_ONCE = 64  # sequences of a pass that trains nothing


# --- the ceiling


def buckets(queries, causal, device):
    """T5's relative positions, [queries, queries]."""
    r = torch.arange(queries, device=device) - torch.arange(queries, device=device)[:, None]
    count = BUCKETS if causal else BUCKETS // 2
    side, r = (0, (-r).clamp(min=0)) if causal else (count * (r > 0), r.abs())
    half = count // 2
    far = half + ((r.clamp(min=1) / half).log() / math.log(DISTANCE / half) * half).long()
    return side + torch.where(r < half, r, far.clamp(max=count - 1))


class Attention(nn.Module):
    def __init__(self, args, positions):
        super().__init__()
        self.heads, self.dropout = args.heads, args.dropout
        self.query = nn.Linear(args.hidden, args.hidden)
        self.key_value = nn.Linear(args.hidden, 2 * args.hidden)
        self.output = nn.Linear(args.hidden, args.hidden)
        self.positions = nn.Parameter(torch.zeros(BUCKETS, args.heads)) if positions else None

    def forward(self, x, memory, mask, causal=False):
        """mask: [batch, 1, queries or 1, keys], True where a query sees a key."""
        parts = (self.query(x), *self.key_value(memory).chunk(2, -1))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        bias = torch.zeros((), device=x.device)
        if self.positions is not None:
            places = buckets(x.shape[1], causal, x.device)[..., None]
            shares = (places == torch.arange(BUCKETS, device=x.device)).float()
            bias = (shares @ self.positions).permute(2, 0, 1)
        bias = bias.masked_fill(~mask, -math.inf)
        dropout = self.dropout if self.training else 0
        mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, args, cross):
        super().__init__()
        h = args.hidden
        self.norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(3 if cross else 2))
        self.own, self.cross = Attention(args, True), Attention(args, False) if cross else None
        self.drop = nn.Dropout(args.dropout)
        up, down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)
        self.feed = nn.Sequential(up, nn.GELU(), self.drop, down)

    def forward(self, x, mask, causal, memory, memory_mask):
        y = self.norms[0](x)
        x = x + self.drop(self.own(y, y, mask, causal))
        if self.cross is not None:
            x = x + self.drop(self.cross(self.norms[2](x), memory, memory_mask))
        return x + self.drop(self.feed(self.norms[1](x)))


class Stack(nn.Module):
    def __init__(self, args, d_model, layers, experts, cross):
        super().__init__()
        self.shape = (layers, experts)
        self.compress = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, args.hidden))
        self.blocks = nn.ModuleList(Block(args, cross) for _ in range(args.blocks))
        self.norm, self.drop = nn.LayerNorm(args.hidden), nn.Dropout(args.dropout)
        self.heads = nn.Linear(args.hidden, layers * experts)

    def forward(self, embedded, mask, causal=False, memory=None, memory_mask=None):
        x = self.drop(self.compress(embedded))
        for block in self.blocks:
            x = block(x, mask, causal, memory, memory_mask)
        x = self.norm(x)
        return self.heads(x).unflatten(-1, self.shape), x


class Wide(nn.Module):
    """As trainer_torch.Predictor: of an encoder, or of an encoder and a decoder."""

    def __init__(self, args, d_model, layers, experts):
        super().__init__()
        self.encoder = Stack(args, d_model, layers[0], experts, False)
        self.decoder = Stack(args, d_model, layers[1], experts, True) if layers[1] else None

    def forward(self, embedding, sides):
        keys = sides[0].real[:, None, None]
        first, memory = self.encoder(F.embedding(sides[0].ids, embedding), keys)
        if self.decoder is None:
            return [first]
        ids, real = sides[1].ids, sides[1].real[:, None, None]
        mask = real & torch.ones(ids.shape[1:] * 2, dtype=torch.bool, device=ids.device).tril()
        embedded = F.embedding(ids, embedding)
        return [first, self.decoder(embedded, mask, True, memory, keys)[0]]


# --- the traces


class Side(trainer_torch.Side):
    def __init__(self, file, name, args, top, eos):
        super().__init__(file, name, args, top)
        group = file[name]
        content = torch.as_tensor(group["content"][:]).bool() if "content" in group else None
        self.content = self.ids != eos if content is None else content.to(args.device)
        self.lengths = torch.as_tensor(group["offsets"][:]).diff()  # on the host

    def rows(self, order, length):
        """As of the base class, but of a given length."""
        first = self.offsets[order]
        at = torch.arange(length, device=first.device)
        real = at < (self.offsets[order + 1] - first)[:, None]
        return (first[:, None] + at).masked_fill(~real, 0), real

    def batch(self, order, length):
        rows, real = self.rows(order, length)
        labels = self.top_ids[rows].long(), self.top_logp[rows]
        return trainer_torch.Batch(self.ids[rows], *labels, real)


class Trace:
    def __init__(self, path, args):
        self.path = path
        with h5py.File(path, "r") as file:
            about = file.attrs
            self.experts, self.top = int(about["experts"]), int(about["top"])
            self.shape = (int(about["vocabulary"]), int(about["d_model"]))
            self.layers = [int(about[f"layers_{side}"]) for side in SIDES]
            if not self.layers[0]:
                raise SystemExit(f"predictors_torch: {path}: has no encoder with MoE layers")
            eos = json.loads(about["config"]).get("eos_token_id", 1)
            self.names = [side for side, n in zip(SIDES, self.layers) if n]
            top = args.top or self.top
            self.sides = [Side(file, name, args, top, eos) for name in self.names]
            self.rows = (file["embedding/ids"][:], torch.as_tensor(file["embedding/rows"][:]))
        self.sequences = len(self.sides[0].lengths)

    def padded(self, order):
        """Of sequences, a tensor of the host: lengths of both sides."""
        longest = (int(side.lengths[order].max()) for side in self.sides)
        return tuple(max(1, math.ceil(n / PAD)) * PAD for n in longest)


def embedding_of(traces, args):
    """All rows that occur in any."""
    table = torch.zeros(traces[0].shape)
    for trace in traces:
        table[trace.rows[0]] = trace.rows[1]
    return table.to(args.device)


# --- training


class Trainer:
    """Steps on batches of one trace. What changes from step to step lies in tensors of the device,
    so that a graph can be replayed; nothing inside a step may wait for the device or copy from the
    host."""

    def __init__(self, args, net, embedding, trace, steps):
        self.args, self.net, self.embedding, self.trace = args, net, embedding, trace
        self.cuda = args.device.startswith("cuda")
        rates = [trainer_torch.rate_at(args, step, steps) for step in range(steps)]
        self.rates = torch.tensor(rates, device=args.device)
        self.rate = torch.zeros((), device=args.device)
        self.order = torch.zeros(args.batch, dtype=torch.long, device=args.device)
        self.share = torch.zeros(args.batch, device=args.device)  # 0: no sequence, only filled up
        self.total = torch.zeros((), device=args.device)
        options = {"weight_decay": args.weight_decay}
        if self.cuda:
            options |= {"fused": True, "capturable": True}
        rate = self.rate if self.cuda else args.lr
        self.optimiser = torch.optim.AdamW(net.parameters(), rate, **options)
        self.steps, self.graphs = 0, {}
        if self.cuda:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def loss(self, sides):
        total, pairs = 0, 0
        for logits, side in zip(self.net(self.embedding, sides), sides):
            logp = side.top_logp.float()
            args = side.top_ids, logp, self.args.tkd, self.args.weight
            counted = side.real[..., None] * self.share[:, None, None]
            total = total + (trainer_torch.pair_losses(logits, *args) * counted).sum()
            pairs = pairs + counted.sum() * logits.shape[2]
        return total / pairs

    def work(self, lengths):
        sides = [s.batch(self.order, n) for s, n in zip(self.trace.sides, lengths)]
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(sides)
        loss.backward()
        if self.args.clip > 0:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.args.clip)
        self.optimiser.step()
        self.total += loss.detach()

    def step(self, order, on_device):
        """order: sequences, on the host and on the device."""
        count = len(order)
        self.order.zero_()[:count].copy_(on_device)
        self.share.zero_()[:count] = 1
        self.rate.copy_(self.rates[self.steps])
        lengths = self.trace.padded(order)
        self.steps += 1
        if not self.cuda:
            for group in self.optimiser.param_groups:
                group["lr"] = float(self.rate)
            self.work(lengths)
        elif self.args.eager or lengths not in self.graphs:  # the first also starts the libraries
            self.graphs[lengths] = None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.work(lengths)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graphs[lengths] is None:
                graph = self.graphs[lengths] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    self.work(lengths)
            self.graphs[lengths].replay()

    def epoch(self):
        """The mean of the steps' losses."""
        self.total.zero_()
        order = torch.randperm(self.trace.sequences)
        parts = order.split(self.args.batch), order.to(self.args.device).split(self.args.batch)
        for part, on_device in zip(*parts):
            self.step(part, on_device)
        return self.total.item() / len(parts[0])


@torch.no_grad()
def passes(args, net, embedding, trace):
    """Yields (side's number, rows of its tokens [tokens], logits [tokens, layers, experts])."""
    net.eval()
    by_length = trace.sides[0].lengths.argsort()
    for order in by_length.split(AT_ONCE):
        lengths, here = trace.padded(order), order.to(args.device)
        sides = [side.batch(here, n) for side, n in zip(trace.sides, lengths)]
        for i, logits in enumerate(net(embedding, sides)):
            rows, real = trace.sides[i].rows(here, lengths[i])
            yield i, rows[real], logits[real]
    net.train()


class Hits:
    """hit@1 and hit@3 of content tokens and of all, per cent of the pairs of both sides."""

    def __init__(self):
        self.counts = {"content": [0, 0, 0], "all": [0, 0, 0]}

    def add(self, side, rows, ranked):
        hit = ranked[..., :3] == side.truth[rows][..., None]
        kinds = {"content": side.content[rows], "all": torch.ones_like(side.content[rows])}
        for kind, chosen in kinds.items():
            found = hit[chosen]
            count = self.counts[kind]
            count[0] += found[..., 0].sum()
            count[1] += found.sum()
            count[2] += found[..., 0].numel()

    def shares(self, kind="content"):
        first, three, pairs = (float(x) for x in self.counts[kind])
        return {"hit@1": 100 * first / pairs, "hit@3": 100 * three / pairs}


def measure(args, net, embedding, trace):
    hits = Hits()
    for i, rows, logits in passes(args, net, embedding, trace):
        hits.add(trace.sides[i], rows, logits.topk(3, -1).indices)
    return hits.shares()


def predict(args, net, embedding, trace, output):
    """Copies the trace and puts predictions in the routing's place."""
    hits, found = Hits(), []
    for side in trace.sides:
        shape = (len(side.ids), side.truth.shape[1], trace.top)
        found.append((torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)))
    for i, rows, logits in passes(args, net, embedding, trace):
        best = logits.log_softmax(-1).topk(trace.top, -1)
        hits.add(trace.sides[i], rows, best.indices)
        found[i][0][rows.cpu()] = best.indices.int().cpu()
        found[i][1][rows.cpu()] = best.values.clamp(min=-65504, max=0).cpu()
    with h5py.File(trace.path, "r") as source, h5py.File(output, "w") as file:
        for name in source:
            source.copy(name, file)
        for name, value in source.attrs.items():
            file.attrs[name] = value
        for name, (ids, logp) in zip(trace.names, found):
            group, k = file[name], file[name]["experts"].shape[2]
            group["top_ids"][...] = ids.numpy()
            group["top_logp"][...] = logp.numpy()
            group["experts"][...] = ids[..., :k].numpy()
            group["alpha"][...] = logp[..., :k].exp().numpy()
    return hits.shares() | {"all_tokens": hits.shares("all")}


def network(args, trace):
    width = trace.shape[1]
    if args.kind == "transformer":
        args.hidden = args.hidden or 256
        return Wide(args, width, trace.layers, trace.experts)
    args.hidden = args.hidden or math.ceil(width / 3 / 64) * 64
    return trainer_torch.Predictor(width, args.hidden, trace.layers, trace.experts)


def run(args, device):
    begin = time.monotonic()
    torch.manual_seed(args.seed)
    device.set_mode("tf32")
    trace, valid, *others = (
        Trace(path, args) for path in (args.trace, args.valid, *(p for p, _ in args.predict))
    )
    embedding = embedding_of([trace, valid, *others], args)
    net = network(args, trace).to(args.device)
    a_pass = math.ceil(trace.sequences / args.batch)
    trainer = Trainer(args, net, embedding, trace, args.epochs * a_pass)
    best, kept, kept_epoch = -1, None, 0
    for epoch in range(1, args.epochs + 1):
        loss = trainer.epoch()
        hit = measure(args, net, embedding, valid)["hit@1"]
        line = f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  valid hit@1 {hit:.2f}"
        print(line, file=sys.stderr, flush=True)
        if hit > best:
            best, kept_epoch = hit, epoch
            kept = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(kept)
    predicted = zip(others, args.predict)
    return {
        "hidden": args.hidden,
        "parameters": sum(p.numel() for p in net.parameters()),
        "epochs": args.epochs,
        "steps": trainer.steps,
        "graphs": sum(graph is not None for graph in trainer.graphs.values()),
        "kept_epoch": kept_epoch,
        "valid": {"overall": {"hit@1": best}},
        "predicted": {t.path: predict(args, net, embedding, t, out) for t, (_, out) in predicted},
        "seconds": round(time.monotonic() - begin, 2),
    }


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kind", choices=["lstm", "transformer"], required=True)
    add("--trace", required=True)
    add("--valid", required=True)
    add("--predict", action="append", default=[], metavar="TRACE=OUT")
    add("--epochs", type=int, default=30)
    add("--batch", type=int, default=16, help="sequences (16)")
    add("--tkd", choices=["rest", "l1-renorm"], default="rest")
    add("--lambda", type=float, dest="weight", default=0.5)
    add("--top", type=int, default=0, help="T (all that the trace has)")
    add("--lr", type=float, default=0.005)
    add("--schedule", choices=["cosine", "constant"], default="cosine")
    add("--warmup", type=int, default=100)
    add("--clip", type=float, default=1)
    add("--weight-decay", type=float, default=0.01)
    add("--hidden", type=int, default=0, help="(lstm: sida train's; transformer: 256)")
    add("--blocks", type=int, default=3, help="of the transformer, as are the next two")
    add("--heads", type=int, default=8)
    add("--dropout", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--device", default="cuda")
    add("--threads", type=int, default=0, help="of the CPU (PyTorch's choice)")
    add("--eager", action="store_true", help="no CUDA graphs")
    add("--json", action="store_true", help="(always)")
    args = parser.parse_args()
    args.predict = [pair.rpartition("=")[::2] for pair in args.predict]
    if not all(a and b for a, b in args.predict):
        parser.error("--predict: expected TRACE=OUT")
    if min(args.epochs, args.batch) < 1:
        parser.error("--epochs and --batch are at least 1")
    return args


def main():
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = trainer_torch.Device(args.device)
    if device.cuda and not torch.cuda.is_available():
        raise SystemExit("predictors_torch: PyTorch finds no GPU; --device cpu runs without one")
    about = trainer_torch.header(device)
    del about["kind"]
    print(json.dumps(about | run(args, device)))


if __name__ == "__main__":
    main()
