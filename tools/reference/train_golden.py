#!/usr/bin/env python3
"""Writes tests/grad/golden/train.safetensors: what PyTorch makes of the predictor; with --options
train_options.safetensors, of one whose encoder's LSTM has two directions and whose attention is softmax; with
--transformer train_transformer.safetensors, of a Transformer, without the paper's loss.

A small predictor (encoder and decoder) in plain PyTorch on the CPU in fp32: initial
tensors, a data set of ragged sequences, for both distillation losses the loss and
every gradient of one batch, and the losses of 200 steps of AdamW. Sequences run one
by one, without padding or masks, so that nothing but the maths is shared with the
code under test. Integers are stored as F32, a Transformer's initial tensors as F16, which holds
them exactly.
Needs: torch (CPU), safetensors.
"""
import argparse
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sida_predictor import Transformer

D, H, E, T, VOCABULARY, LAYERS = 12, 8, 6, 4, 24, (2, 1)
SEQUENCES, STEPS, BATCH, LR, DECAY, LAMBDA = 20, 200, 6, 5e-3, 0.01, 0.3


def sparsemax(z):
    """Martins and Astudillo 2016, equation 4, over the last axis."""
    ordered, _ = z.sort(-1, descending=True)
    total = ordered.cumsum(-1)
    rank = torch.arange(1, z.size(-1) + 1, dtype=z.dtype)
    size = (1 + rank * ordered > total).sum(-1, keepdim=True)
    threshold = (total.gather(-1, size - 1) - 1) / size
    return (z - threshold).clamp(min=0)


class Trunk(nn.Module):
    def __init__(self, layers, both, weigh):
        super().__init__()
        self.compress = nn.Linear(D, H)
        self.lstm = nn.LSTM(H, H // 2 if both else H, num_layers=2, bidirectional=both)
        self.weigh = weigh
        self.residual = nn.Linear(H, H)
        self.heads = nn.Linear(H, layers * E)
        self.layers = layers

    def forward(self, e, causal, memory):
        """e [n, D]; memory: the encoder's LSTM output, or None. Logits [n, layers, E], h [n, H]."""
        x = F.relu(self.compress(e))
        h, _ = self.lstm(x)
        o = self.residual(x)
        if causal:
            rows = [self.weigh(h[i : i + 1] @ h[: i + 1].T) @ h[: i + 1] for i in range(len(h))]
            o = o + torch.cat(rows)
        else:
            o = o + self.weigh(h @ h.T) @ h
        if memory is not None:
            o = o + self.weigh(h @ memory.T) @ memory
        return self.heads(o).view(-1, self.layers, E), h


class Net(nn.Module):
    def __init__(self, options):
        super().__init__()
        weigh = (lambda z: z.softmax(-1)) if options else sparsemax
        self.encoder, self.decoder = Trunk(LAYERS[0], options, weigh), Trunk(LAYERS[1], False, weigh)

    def forward(self, source, target):
        encoded, h = self.encoder(source, False, None)
        decoded, _ = self.decoder(target, True, h)
        return encoded, decoded


class TransformerNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (Transformer(D, 32, 2, n * E, side == 1) for side, n in enumerate(LAYERS))
        with torch.no_grad():
            for q in self.parameters():  # none begins where the gradient of another is zero
                q.add_(0.1 * torch.randn_like(q))
                q.copy_(q.half().float())

    def forward(self, source, target):
        encoded, x = self.encoder(source, None, False)
        decoded, _ = self.decoder(target, x, True)
        return encoded.unflatten(-1, (-1, E)), decoded.unflatten(-1, (-1, E))


def pair_losses(z, ids, logp, kind):
    """z [n, layers, E], teacher's top T; one loss a token and layer."""
    student = z.log_softmax(-1)
    if kind == "rest":
        p = logp.exp()
        p = p / p.sum(-1, keepdim=True).clamp(min=1)
        inside = torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, True)
        outside = student.masked_fill(inside, float("-inf")).logsumexp(-1)
        tkd = -(p * student.gather(-1, ids)).sum(-1) - (1 - p.sum(-1)) * outside
    else:
        tkd = (z.gather(-1, ids).softmax(-1) - logp.softmax(-1)).abs().mean(-1)
    ce = -student.gather(-1, ids[..., :1]).squeeze(-1)
    return tkd + LAMBDA * ce


def batch_loss(net, data, table, order, kind):
    parts = []
    for s in order:
        sides = data[s]
        logits = net(table[sides[0][0]], table[sides[1][0]])
        for z, (_, ids, logp) in zip(logits, sides):
            parts.append(pair_losses(z, ids, logp, kind).flatten())
    return torch.cat(parts).mean()


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--options", action="store_true", help="two directions and softmax")
    p.add_argument("--transformer", action="store_true")
    p.add_argument("--output")
    a = p.parse_args()
    name = "train_options.safetensors" if a.options else "train.safetensors"
    name = "train_transformer.safetensors" if a.transformer else name
    a.output = a.output or os.path.join(here, "../../tests/grad/golden", name)
    lr = LR / 10 if a.transformer else LR  # else the flip of a relu amplifies how each side rounds
    torch.manual_seed(7)
    torch.set_num_threads(1)
    net = TransformerNet() if a.transformer else Net(a.options)
    with torch.no_grad():  # large enough that SparseMax drops keys
        for q in net.parameters() if not a.transformer else ():
            q.mul_(2.5)
    table = torch.randn(VOCABULARY, D)
    data, out = [], {"embedding": table}
    for _ in range(SEQUENCES):
        sides = []
        for layers, longest in zip(LAYERS, (9, 4)):
            n = int(torch.randint(1, longest + 1, ()))
            ids = torch.randint(0, VOCABULARY, (n,))
            logp = (2 * torch.randn(n, layers, E)).log_softmax(-1)
            value, index = logp.sort(-1, descending=True)
            # fp16 is what a trace holds
            sides.append((ids, index[..., :T].contiguous(), value[..., :T].half().float()))
        data.append(sides)
    for i, side in enumerate(("encoder", "decoder")):
        lengths = torch.tensor([0] + [len(d[i][0]) for d in data])
        out[f"{side}.offsets"] = lengths.cumsum(0).float()
        out[f"{side}.tokens"] = torch.cat([d[i][0] for d in data]).float()
        out[f"{side}.top_ids"] = torch.cat([d[i][1] for d in data]).float()
        out[f"{side}.top_logp"] = torch.cat([d[i][2] for d in data]).half()
    initial = {k: v.clone() for k, v in net.state_dict().items()}
    out |= {f"initial.{k}": v.half() if a.transformer else v for k, v in initial.items()}
    for kind in ("rest",) if a.transformer else ("rest", "l1-renorm"):
        net.load_state_dict(initial)
        net.zero_grad()
        loss = batch_loss(net, data, table, range(SEQUENCES), kind)
        loss.backward()
        out[f"{kind}.loss"] = loss.detach().reshape(1)
        out |= {f"{kind}.gradient.{k}": v.grad.clone() for k, v in net.named_parameters()}
        optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=DECAY)
        orders, losses = [], []
        generator = torch.Generator().manual_seed(11)
        for _ in range(STEPS):
            order = torch.randperm(SEQUENCES, generator=generator)[:BATCH].tolist()
            optimiser.zero_grad()
            loss = batch_loss(net, data, table, order, kind)
            loss.backward()
            optimiser.step()
            orders.append(order)
            losses.append(loss.item())
        out["orders"] = torch.tensor(orders).float()
        out[f"{kind}.losses"] = torch.tensor(losses)
        print(kind, out[f"{kind}.loss"].item(), losses[0], losses[-1])
    meta = {"constants": f"top {T} lr {lr} weight_decay {DECAY} lambda {LAMBDA}"}
    save_file({k: v.contiguous() for k, v in out.items()}, a.output, metadata=meta)
    print(a.output, os.path.getsize(a.output), "bytes")


main()
