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

KNOWN = {"d_model", "hidden", "lstm_layers", "experts", "vocabulary", "layers_encoder", "layers_decoder"}


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
        c = self.config = json.loads(self.about["config"])["net"]
        if set(c) != KNOWN:
            raise ValueError(f"{path}: a network of other options: {sorted(set(c) ^ KNOWN)}")
        h = c["hidden"]
        for side in ("encoder", "decoder"):
            if c[f"layers_{side}"]:
                parts = {"compress": nn.Linear(c["d_model"], h), "lstm": nn.LSTM(h, h, c["lstm_layers"]),
                         "residual": nn.Linear(h, h), "heads": nn.Linear(h, c[f"layers_{side}"] * c["experts"])}
                self.add_module(side, nn.ModuleDict(parts))
        self.load_state_dict(tensors)

    def trunk(self, side, e, memory, causal):
        part = getattr(self, side, None)
        if part is None:
            return None, None
        x = part["compress"](e).relu()
        h, _ = part["lstm"](x)
        scores = h @ h.T
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        o = part["residual"](x) + sparsemax(scores) @ h
        if memory is not None and len(memory):
            o = o + sparsemax(h @ memory.T) @ memory
        return part["heads"](o).view(len(e), -1, self.config["experts"]), h

    def forward(self, source, target):
        encoded, memory = self.trunk("encoder", source, None, False)
        return encoded, self.trunk("decoder", target, memory, True)[0]
