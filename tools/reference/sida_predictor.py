"""The exported predictor (`sida export`) in PyTorch: what runtime/predictor/net.h defines.

    net = Predictor("predictor.safetensors")
    encoder_logits, decoder_logits = net(encoder_embeddings, decoder_embeddings)

Takes one sequence's input embeddings a side, [n, d_model]; gives [n, MoE layers, experts]. A side
without MoE layers takes anything and gives None. Needs: torch, safetensors.
"""
import json

import torch
from safetensors import safe_open
from torch import nn

SIZES = {"d_model", "hidden", "lstm_layers", "experts", "vocabulary", "layers_encoder", "layers_decoder"}
OPTIONS = {"bidirectional": False, "attention": "sparsemax"}  # what a file that names none means


def sparsemax(z):
    """Martins and Astudillo 2016, equation 4, over the last axis; -inf takes no part."""
    ordered = z.sort(-1, descending=True)[0]
    total = ordered.cumsum(-1)
    size = (1 + torch.arange(1, z.size(-1) + 1) * ordered > total).sum(-1, keepdim=True)
    return (z - (total.gather(-1, size - 1) - 1) / size).clamp(min=0)


class Predictor(nn.Module):
    def __init__(self, path):
        super().__init__()
        with safe_open(path, "pt") as file:
            self.about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        c = self.config = OPTIONS | json.loads(self.about["config"])["net"]
        if set(c) != SIZES | set(OPTIONS):
            raise ValueError(f"{path}: a network of other options: {sorted(set(c) ^ (SIZES | set(OPTIONS)))}")
        self.weigh = {"sparsemax": sparsemax, "softmax": lambda z: z.softmax(-1), "none": None}[c["attention"]]
        h = c["hidden"]
        for side in ("encoder", "decoder"):
            if c[f"layers_{side}"]:
                both = c["bidirectional"] and side == "encoder"
                lstm = nn.LSTM(h, h // 2 if both else h, c["lstm_layers"], bidirectional=both)
                parts = {"compress": nn.Linear(c["d_model"], h), "lstm": lstm,
                         "residual": nn.Linear(h, h), "heads": nn.Linear(h, c[f"layers_{side}"] * c["experts"])}
                self.add_module(side, nn.ModuleDict(parts))
        self.load_state_dict(tensors)

    def trunk(self, side, e, memory, causal):
        part = getattr(self, side, None)
        if part is None:
            return None, None
        x = part["compress"](e).relu()
        h, _ = part["lstm"](x)
        if not self.weigh:
            return part["heads"](part["residual"](x) + h).view(len(e), -1, self.config["experts"]), h
        scores = h @ h.T
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        o = part["residual"](x) + self.weigh(scores) @ h
        if memory is not None and len(memory):
            o = o + self.weigh(h @ memory.T) @ memory
        return part["heads"](o).view(len(e), -1, self.config["experts"]), h

    def forward(self, source, target):
        encoded, memory = self.trunk("encoder", source, None, False)
        return encoded, self.trunk("decoder", target, memory, True)[0]
