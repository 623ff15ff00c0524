#!/usr/bin/env python3
"""The trainer's PyTorch side: the network of runtime/predictor/net.h (compress + ReLU, a 2-layer
LSTM by cuDNN, exact SparseMax attention with padding masked, a residual, one linear for all heads;
a causal decoder that also attends to the encoder's), the losses of trainer/loss.h and fused AdamW.

Without --trace: steps on one random batch without padding, an encoder alone, for each --modes,
--experts and --lengths; no mask is applied then. The batch lies on the device before the clock
starts, in the types that PyTorch computes with. A sample is the mean time of a step in a block of
--block steps between two synchronisations. Memory: the allocator's peak, and what the driver counts
as used when the case is done (the allocator gives nothing back in between and starts it empty).

  eager     fp32 throughout
  tf32      products and the LSTM may round their factors to TF32
  compile   the same, network and loss through torch.compile
  lstm      the LSTM's forward and backward alone, in fp32 and TF32, as PyTorch issues them and as a
            CUDA graph

With --trace: trains on a trace as `sida train` does, with its options and defaults, the traces on
the device, batches padded to their longest sequence; measures hit@1 on --valid after each epoch.

Prints JSON lines: a header, then a row a case, or a line with "failed" and the reason; exits with 1
if there is one.

  tools/bench/trainer_torch.py --modes eager tf32 compile lstm
  tools/bench/trainer_torch.py --trace train.h5 --valid valid.h5 --tkd rest --lambda 0.5
"""

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from predictor_torch import LSTM_LAYERS, VOCABULARY, sparsemax
from torch import nn

MODES = ["eager", "tf32", "compile", "lstm"]


def say(line):
    print(json.dumps(line), flush=True)


# --- the network


class SparseMax(torch.autograd.Function):
    """Keeps the probabilities alone; the gradient is the projection's: on the support the gradient
    minus its mean there."""

    @staticmethod
    def forward(ctx, scores):
        p = sparsemax(scores)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, d_p):
        (p,) = ctx.saved_tensors
        support = p > 0
        d_p = d_p * support
        return (d_p - d_p.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)) * support


def attend(queries, memory, mask):
    """mask: True where a query sees a key, or None: everywhere."""
    scores = queries @ memory.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return SparseMax.apply(scores) @ memory


class Trunk(nn.Module):
    def __init__(self, d_model, hidden, layers, experts):
        super().__init__()
        self.shape = (layers, experts)
        self.compress = nn.Linear(d_model, hidden)
        self.lstm = nn.LSTM(hidden, hidden, LSTM_LAYERS, batch_first=True)
        self.residual = nn.Linear(hidden, hidden)
        self.heads = nn.Linear(hidden, layers * experts)

    def forward(self, embedded, mask=None, memory=None, memory_mask=None):
        """embedded [batch, tokens, d_model]: logits [batch, tokens, layers, experts] and the LSTM's
        output. Padding is on the right, so the LSTM needs no mask."""
        x = F.relu(self.compress(embedded))
        h, _ = self.lstm(x)
        mixed = self.residual(x) + attend(h, h, mask)
        if memory is not None:
            mixed = mixed + attend(h, memory, memory_mask)
        return self.heads(mixed).unflatten(-1, self.shape), h


class Predictor(nn.Module):
    def __init__(self, d_model, hidden, layers, experts):
        super().__init__()
        self.encoder = Trunk(d_model, hidden, layers[0], experts)
        self.decoder = Trunk(d_model, hidden, layers[1], experts) if layers[1] else None

    def forward(self, embedding, sides):
        """sides: of the encoder and the decoder, batches as in Side.batch."""
        keys = sides[0].real
        mask = None if keys is None else keys[:, None, :]
        first, memory = self.encoder(F.embedding(sides[0].ids, embedding), mask)
        if self.decoder is None:
            return [first]
        ids, real = sides[1].ids, sides[1].real
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        mask = causal if real is None else causal & real[:, None, :]
        memory_mask = None if keys is None else keys[:, None, :]
        return [first, self.decoder(F.embedding(ids, embedding), mask, memory, memory_mask)[0]]


class Batch:
    """ids [batch, tokens], top_ids and top_logp [batch, tokens, layers, top]; real [batch, tokens]:
    no padding, None where there is none."""

    def __init__(self, ids, top_ids, top_logp, real=None):
        self.ids, self.top_ids, self.top_logp, self.real = ids, top_ids, top_logp, real


def pair_losses(logits, top_ids, top_logp, tkd, weight):
    """TKD + weight * CE of every token and layer, as trainer/loss.h has them."""
    chosen = logits.gather(-1, top_ids)
    log_sum = logits.logsumexp(-1)
    if tkd == "l1-renorm":
        distilled = (chosen.softmax(-1) - top_logp.softmax(-1)).abs().mean(-1)
    else:
        teacher = top_logp.exp()
        mass = teacher.sum(-1, keepdim=True)
        whole = top_ids.shape[-1] == logits.shape[-1]
        teacher = teacher / (mass if whole else mass.clamp(min=1))
        distilled = -(teacher * (chosen - log_sum[..., None])).sum(-1)
        if not whole:
            outside = logits.scatter(-1, top_ids, -math.inf).logsumexp(-1) - log_sum
            distilled = distilled - (1 - teacher.sum(-1)) * outside
    return distilled + weight * (log_sum - chosen[..., 0])


def batch_loss(net, embedding, sides, tkd, weight):
    """The mean over the pairs of both sides."""
    total, pairs = 0, 0
    for logits, side in zip(net(embedding, sides), sides):
        losses = pair_losses(logits, side.top_ids, side.top_logp.float(), tkd, weight)
        if side.real is not None:
            losses = losses * side.real[..., None]
            pairs = pairs + side.real.sum() * losses.shape[-1]
        else:
            pairs = pairs + losses.numel()
        total = total + losses.sum()
    return total / pairs


class Trainer:
    def __init__(self, args, net, mode):
        self.args, self.net = args, net
        self.loss = torch.compile(batch_loss, dynamic=False) if mode == "compile" else batch_loss
        options = {"weight_decay": args.weight_decay, "fused": args.device.startswith("cuda")}
        self.optimiser = torch.optim.AdamW(net.parameters(), args.lr, **options)

    def step(self, embedding, sides, rate):
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self.loss(self.net, embedding, sides, self.args.tkd, self.args.weight)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.args.clip > 0:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.args.clip)
        self.optimiser.step()
        return loss.detach()


def rate_at(args, step, steps):
    rate = args.lr
    if args.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate * min(1, (step + 1) / args.warmup) if args.warmup else rate


# --- the device


class Device:
    def __init__(self, name):
        self.cuda = torch.device(name).type == "cuda"

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def set_mode(self, mode):
        tf32 = mode != "eager"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32

    def forget(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def used(self):
        free, total = torch.cuda.mem_get_info() if self.cuda else (0, 0)
        return total - free

    def memory(self, before):
        if not self.cuda:
            return {}
        return {
            "torch_bytes_peak": torch.cuda.max_memory_allocated(),
            "torch_bytes_reserved": torch.cuda.max_memory_reserved(),
            "driver_bytes_before": before,
            "driver_bytes_peak": self.used(),
        }


def blocks(args, device, once):
    """Mean ms of once() in each of --blocks blocks."""
    for _ in range(args.warm):
        once()
    samples = []
    for _ in range(args.blocks):
        device.wait()
        begin = time.perf_counter()
        for _ in range(args.block):
            once()
        device.wait()
        samples.append((time.perf_counter() - begin) * 1e3 / args.block)
    return samples


# --- steps on random data


def random_batch(args, experts, length):
    """Made on the host, so that making it is no part of the device's memory peak."""
    generator = torch.Generator().manual_seed(7)
    top = min(args.top or 30, experts)
    shape = (args.batch, length, args.layers)
    ids = torch.randint(3, args.vocabulary, shape[:2], generator=generator)
    first = torch.randint(experts, (*shape, 1), generator=generator)
    top_ids = (first + torch.randperm(experts, generator=generator)[:top]) % experts
    scores = 2 * torch.randn(64, experts, generator=generator)
    logp = scores.log_softmax(-1).sort(-1, descending=True).values[:, :top].half()
    top_logp = logp[torch.randint(64, shape, generator=generator)]
    return Batch(*(t.to(args.device) for t in (ids, top_ids, top_logp)))


def measure_steps(args, device, mode, experts, length):
    torch.manual_seed(0)
    device.forget()
    before = device.used()
    net = Predictor(args.d_model, args.hidden, (args.layers, 0), experts).to(args.device)
    embedding = torch.randn(args.vocabulary, args.d_model, device=args.device)
    sides = [random_batch(args, experts, length)]
    trainer = Trainer(args, net, mode)
    device.wait()
    losses = []

    def once():
        losses[:] = [trainer.step(embedding, sides, args.lr)]

    samples = blocks(args, device, once)
    median = statistics.median(samples)
    return {
        "batch": args.batch,
        "length": length,
        "latency_ms": median,
        "tokens_per_s": args.batch * length / median * 1e3,
        "parameters": sum(p.numel() for p in net.parameters()),
        "loss": losses[0].item(),
        **device.memory(before),
        "samples_ms": samples,
    }


def lstm_alone(args, device, length, graph):
    """Gradients of all weights and of the input, as a network needs them."""
    torch.manual_seed(0)
    device.forget()
    net = nn.LSTM(args.hidden, args.hidden, LSTM_LAYERS, batch_first=True).to(args.device)
    x = torch.randn(args.batch, length, args.hidden, device=args.device, requires_grad=True)
    d_y = torch.randn(args.batch, length, args.hidden, device=args.device)
    wanted = [x, *net.parameters()]

    def once():
        y, _ = net(x)
        return torch.autograd.grad(y, wanted, d_y)

    if graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            kept = once()  # noqa: F841
        once = recorded.replay
    return {"batch": args.batch, "length": length, "samples_ms": blocks(args, device, once)}


def lstm_ways(args, device):
    for graph in (False, True) if device.cuda else (False,):  # one that fails may spoil the rest
        for precision in ("fp32", "tf32"):
            device.set_mode("eager" if precision == "fp32" else "tf32")
            way = f"lstm-torch-{precision}" + ("-graph" if graph else "")
            for length in args.lengths:
                case = {"mode": way, "experts": 0}
                yield case, lambda n=length, g=graph: lstm_alone(args, device, n, g)


def step_cases(args, device):
    for mode in args.modes:
        if mode == "lstm":
            yield from lstm_ways(args, device)
            continue
        device.set_mode(mode)
        for experts in args.experts:
            for length in args.lengths:
                case = {"mode": mode, "experts": experts, "tkd": args.tkd, "clip": args.clip}
                yield case, lambda m=mode, e=experts, n=length: measure_steps(args, device, m, e, n)
                if mode == "compile":
                    torch._dynamo.reset()


# --- training on a trace


class Side:
    """One side of a trace on the device, as it is stored: ragged."""

    def __init__(self, file, name, args, top):
        group = file[name]
        to = lambda values, kind: torch.as_tensor(values.astype(kind)).to(args.device)  # noqa: E731
        self.ids = to(group["tokens"][:], "int64")
        self.offsets = to(group["offsets"][:], "int64")
        self.top_ids = to(group["top_ids"][:, :, :top], "int16")
        self.top_logp = to(group["top_logp"][:, :, :top], "float16")
        self.truth = to(group["experts"][:, :, 0], "int64")

    def rows(self, order):
        """Rows of the sequences' tokens, padded to the longest: [batch, tokens], and which are."""
        first = self.offsets[order]
        lengths = self.offsets[order + 1] - first
        at = torch.arange(int(lengths.max()), device=first.device)
        real = at < lengths[:, None]
        return torch.where(real, first[:, None] + at, 0), real

    def batch(self, order):
        rows, real = self.rows(order)
        return Batch(self.ids[rows], self.top_ids[rows].long(), self.top_logp[rows], real)


class Trace:
    def __init__(self, path, args):
        import h5py

        with h5py.File(path, "r") as file:
            self.experts, top = int(file.attrs["experts"]), int(file.attrs["top"])
            self.layers = [int(file.attrs[f"layers_{s}"]) for s in ("encoder", "decoder")]
            names = [s for s, n in zip(("encoder", "decoder"), self.layers) if n]
            self.sides = [Side(file, name, args, args.top or top) for name in names]
            width, rows = int(file.attrs["d_model"]), int(file.attrs["vocabulary"])
            self.embedding = torch.zeros(rows, width)
            self.embedding[file["embedding/ids"][:]] = torch.as_tensor(file["embedding/rows"][:])
            self.embedding = self.embedding.to(args.device)
        self.sequences = len(self.sides[0].offsets) - 1
        self.tokens = sum(len(side.ids) for side in self.sides)


@torch.no_grad()
def hit_at_1(args, net, trace):
    """Per cent of the pairs of both sides."""
    hits, pairs = 0, 0
    for order in torch.arange(trace.sequences, device=args.device).split(args.batch):
        sides = [side.batch(order) for side in trace.sides]
        for logits, side in zip(net(trace.embedding, sides), trace.sides):
            rows, real = side.rows(order)
            hits += ((logits.argmax(-1) == side.truth[rows]) & real[..., None]).sum()
            pairs += real.sum() * logits.shape[2]
    return 100 * (hits / pairs).item()


def train(args, device, mode):
    begin = time.perf_counter()
    torch.manual_seed(0)
    device.set_mode(mode)
    device.forget()
    before = device.used()
    trace, valid = Trace(args.trace, args), Trace(args.valid, args)
    width = trace.embedding.shape[1]
    net = Predictor(width, args.hidden, trace.layers, trace.experts).to(args.device)
    trainer = Trainer(args, net, mode)
    steps_an_epoch = math.ceil(trace.sequences / args.batch)
    steps, step = args.epochs * steps_an_epoch, 0
    device.wait()
    loaded = time.perf_counter()
    curve, hits, seconds = [], [], []
    for _ in range(args.epochs):
        start = time.perf_counter()
        losses = []
        for order in torch.randperm(trace.sequences).to(args.device).split(args.batch):
            sides = [side.batch(order) for side in trace.sides]
            losses.append(trainer.step(trace.embedding, sides, rate_at(args, step, steps)))
            step += 1
        curve.append(torch.stack(losses).mean().item())
        hits.append(hit_at_1(args, net, valid))
        device.wait()
        seconds.append(time.perf_counter() - start)
    return {
        "batch": args.batch,
        "experts": trace.experts,
        "sequences": trace.sequences,
        "tokens": trace.tokens,
        "epochs": args.epochs,
        "steps": step,
        "loading_seconds": loaded - begin,
        "seconds": sum(seconds),
        "tokens_per_s": trace.tokens * args.epochs / sum(seconds),
        "loss": curve,
        "valid_hit@1": hits,
        **device.memory(before),
        "epoch_seconds": seconds,
    }


# --- the program


def header(device):
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    line = {"kind": "header", "versions": versions, "device": "cpu"}
    if device.cuda:
        line["device"] = torch.cuda.get_device_name()
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = torch.backends.cudnn.version()
    return line


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, default=["eager", "tf32", "compile"])
    add("--experts", type=int, nargs="+", default=[8, 128, 256])
    add("--lengths", type=int, nargs="+", default=[32, 64, 512])
    add("--batch", type=int, default=64, help="sequences")
    add("--d-model", type=int, default=768)
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=6, help="MoE layers")
    add("--vocabulary", type=int, default=VOCABULARY)
    add("--top", type=int, default=0, help="T (30, of a trace all that it has)")
    add("--tkd", choices=["rest", "l1-renorm"], default="l1-renorm")
    add("--lambda", type=float, dest="weight", default=0.005)
    add("--clip", type=float, default=0, help="largest gradient norm, 0: no limit")
    add("--lr", type=float, default=5e-5)
    add("--weight-decay", type=float, default=0.01)
    add("--warm", type=int, default=8, help="steps before those that are timed")
    add("--blocks", type=int, default=6)
    add("--block", type=int, default=10, help="steps a block")
    add("--trace", help="train on it, with --valid, --epochs, --schedule and --warmup")
    add("--valid")
    add("--epochs", type=int, default=30)
    add("--schedule", choices=["cosine", "constant"], default="cosine")
    add("--warmup", type=int, default=100, help="steps of rising learning rate")
    add("--device", default="cuda")
    args = parser.parse_args()
    if bool(args.trace) != bool(args.valid):
        parser.error("--trace and --valid go together")
    if args.trace and "lstm" in args.modes:
        parser.error("--modes lstm trains on no trace")
    if min(args.blocks, args.block, args.warm, args.batch, args.epochs) < 1:
        parser.error("--blocks, --block, --warm, --batch and --epochs are at least 1")
    return args


def main():
    args = parse()
    device = Device(args.device)
    if device.cuda and not torch.cuda.is_available():
        raise SystemExit("trainer_torch.py: PyTorch finds no GPU; --device cpu runs without one")
    say(header(device))
    if args.trace:
        cases = (({"mode": m}, lambda m=m: train(args, device, m)) for m in args.modes)
    else:
        cases = step_cases(args, device)
    failed = 0
    for case, run in cases:
        try:
            say({"kind": "row"} | case | run())
        except Exception as error:  # out of memory, say: the next case may still run
            failed += 1
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say({"kind": "failed"} | case | {"failed": reason})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
