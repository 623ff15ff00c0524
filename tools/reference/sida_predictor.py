"""The exported predictor (`sida export`) in PyTorch: what runtime/predictor/net.h defines.

    net = Predictor("predictor.safetensors")
    encoder_logits, decoder_logits = net(encoder_embeddings, decoder_embeddings)

Takes one sequence's input embeddings a side, [n, d_model]; gives [n, MoE layers, experts]. A side
without MoE layers takes anything and gives None. With a refinement (runtime/predictor/refine.h) a
third argument may give, a side, the experts that the model chose in its MoE layers 0 ... l, [n, l + 1,
top_k], or None: the logits of the layers behind l are then refined.

Needs: torch >= 2.4, safetensors.
"""
import json
import math

import torch
from safetensors import safe_open
from torch import nn

SIZES = {"d_model", "hidden", "experts", "vocabulary", "layers_encoder", "layers_decoder"}
# What else a network of each kind says, and what a file that does not say it means; None: it must.
OPTIONS = {"lstm": {"lstm_layers": None, "bidirectional": False, "attention": "sparsemax"},
           "transformer": {"blocks": None}}


def sparsemax(z):
    """Martins and Astudillo 2016, equation 4, over the last axis; -inf takes no part."""
    ordered = z.sort(-1, descending=True)[0]
    total = ordered.cumsum(-1)
    size = (1 + torch.arange(1, z.size(-1) + 1) * ordered > total).sum(-1, keepdim=True)
    return (z - (total.gather(-1, size - 1) - 1) / size).clamp(min=0)


def buckets(n, causal):
    """T5's relative positions, [n queries, n keys]: 32 buckets, half of them logarithmic, to a distance of 128."""
    r = torch.arange(n) - torch.arange(n)[:, None]
    count = 32 if causal else 16
    side, r = (0, (-r).clamp(min=0)) if causal else (16 * (r > 0), r.abs())
    half = count // 2
    far = half + ((r.clamp(min=1) / half).log() / math.log(128 / half) * half).long()
    return side + torch.where(r < half, r, far.clamp(max=count - 1))


class Attend(nn.Module):
    def __init__(self, h, cross):
        super().__init__()
        self.norm = nn.RMSNorm(h, eps=1e-6)
        self.query, self.key_value, self.output = (nn.Linear(h, n, bias=False) for n in (h, 2 * h, h))
        self.positions = None if cross else nn.Parameter(torch.zeros(32, h // 32))

    def forward(self, x, memory, causal):
        x = self.norm(x)
        keys, values = self.key_value(x if memory is None else memory).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, 32)).transpose(0, 1) for t in (self.query(x), keys, values))
        scores = q @ k.transpose(1, 2) / 32**0.5
        if memory is None:
            scores = scores + self.positions[buckets(len(x), causal)].permute(2, 0, 1)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
        return self.output((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


class Refine(nn.Module):
    """forward: f [n, h] what the heads read, s [n, layers, experts] what they said, chosen [n, l + 1, top_k]."""

    def __init__(self, h, layers, experts, width):
        super().__init__()
        rows = (layers - 1) * experts
        self.features, self.heads = nn.Linear(h, width, bias=False), nn.Linear(width, rows)
        self.bias, self.known = nn.Parameter(torch.zeros(layers - 1, width)), nn.Parameter(torch.zeros(rows, width))

    def forward(self, f, s, chosen):
        n, l = len(f), chosen.shape[1] - 1
        rows = chosen + s.shape[2] * torch.arange(l + 1)[:, None]
        z = (self.features(f) + self.bias[l] + self.known[rows].sum((1, 2))).relu()
        return torch.cat((s[:, :l + 1], s[:, l + 1:] + self.heads(z).view(n, -1, s.shape[2])[:, l:]), 1)


class Transformer(nn.Module):
    """One side. forward: e [n, d_model], memory: the encoder's x or None; gives logits [n, ...] and x."""

    def __init__(self, d_model, h, blocks, outputs, cross):
        super().__init__()
        norm = lambda n: nn.RMSNorm(n, eps=1e-6)
        self.compress, self.norm_in = nn.Linear(d_model, h), norm(d_model)
        layers = lambda: {"self": Attend(h, False), "norm": norm(h), "up": nn.Linear(h, 2 * h, bias=False),
                          "down": nn.Linear(2 * h, h, bias=False)} | ({"cross": Attend(h, True)} if cross else {})
        self.blocks = nn.ModuleList(nn.ModuleDict(layers()) for _ in range(blocks))
        if cross:
            self.norm_memory = norm(h)
        self.norm_out, self.heads = norm(h), nn.Linear(h, outputs)

    def trunk(self, e, memory, causal):
        x = self.compress(self.norm_in(e))
        for b in self.blocks:
            x = x + b["self"](x, None, causal)
            if memory is not None and len(memory):
                x = x + b["cross"](x, self.norm_memory(memory), False)
            x = x + b["down"](b["up"](b["norm"](x)).relu())
        return self.norm_out(x), x

    def forward(self, e, memory, causal):
        f, x = self.trunk(e, memory, causal)
        return self.heads(f), x


class Predictor(nn.Module):
    def __init__(self, path):
        super().__init__()
        with safe_open(path, "pt") as file:
            self.about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(self.about["config"])
        says, refine = config["net"], config.get("refine")
        kind = says.pop("kind", "lstm")
        options = OPTIONS.get(kind, {})
        c = self.config = options | says
        if set(c) != SIZES | set(options) or None in c.values():
            raise ValueError(f"{path}: a network of other options: {sorted(set(c) ^ (SIZES | set(options)))}")
        weights = {"sparsemax": sparsemax, "softmax": lambda z: z.softmax(-1), "none": None}
        self.weigh = weights[c.get("attention", "none")]
        h = c["hidden"]
        for side in ("encoder", "decoder"):
            if c[f"layers_{side}"] and kind == "transformer":
                cross = side == "decoder" and c["layers_encoder"] > 0
                outputs = c[f"layers_{side}"] * c["experts"]
                self.add_module(side, Transformer(c["d_model"], h, c["blocks"], outputs, cross))
            elif c[f"layers_{side}"]:
                both = c["bidirectional"] and side == "encoder"
                lstm = nn.LSTM(h, h // 2 if both else h, c["lstm_layers"], bidirectional=both)
                parts = {"compress": nn.Linear(c["d_model"], h), "lstm": lstm,
                         "residual": nn.Linear(h, h), "heads": nn.Linear(h, c[f"layers_{side}"] * c["experts"])}
                self.add_module(side, nn.ModuleDict(parts))
            if refine and c[f"layers_{side}"] > 1:
                refined = Refine(h, c[f"layers_{side}"], c["experts"], refine["width"])
                getattr(self, side).add_module("refine", refined)
        self.load_state_dict(tensors)

    def trunk(self, part, e, memory, causal):
        """What the heads read, and what the decoder's cross-attention does."""
        if isinstance(part, Transformer):
            return part.trunk(e, memory, causal)
        x = part["compress"](e).relu()
        h, _ = part["lstm"](x)
        if not self.weigh:
            return part["residual"](x) + h, h
        scores = h @ h.T
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        o = part["residual"](x) + self.weigh(scores) @ h
        if memory is not None and len(memory):
            o = o + self.weigh(h @ memory.T) @ memory
        return o, h

    def side(self, side, e, memory, chosen):
        part = getattr(self, side, None)
        if part is None:
            return None, None
        f, memory = self.trunk(part, e, memory, side == "decoder")
        logits = part.heads(f).view(len(e), -1, self.config["experts"])
        return logits if chosen is None else part.refine(f, logits, chosen), memory

    def forward(self, source, target, chosen=(None, None)):
        encoded, memory = self.side("encoder", source, None, chosen[0])
        return encoded, self.side("decoder", target, memory, chosen[1])[0]
