"""Switch Transformers for training, small and readable. Modules carry the names that Hugging Face
Transformers gives them, so that a state dict is nearly a checkpoint; `save` writes one.

Routing follows Fedus et al. 2022: top-1, alpha is the softmax probability, load-balancing and z
losses, and a capacity over the whole batch while training. In evaluation the capacity is counted a
sequence at a time, as Hugging Face Transformers 4.57 does it. In training mode every shape is fixed
and nothing waits for the device, so that a CUDA graph can hold a step.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PRESETS = {
    "sample": dict(
        d_model=96,
        d_kv=32,
        num_heads=3,
        d_ff=96,
        num_layers=6,
        num_decoder_layers=4,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=2,
        num_experts=64,
    ),
    "tiny": dict(
        d_model=16,
        d_kv=8,
        num_heads=2,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
    ),
}
VOCAB, PAD, EOS = 32128, 0, 1
BUCKETS, FAR = 32, 128  # relative position bias
EXPERT_CAPACITY = 64  # tokens an expert takes from one sequence in evaluation
MASKED = -1e9


@dataclass
class Routing:
    """What the MoE layers of one forward pass report."""

    losses: list[Tensor] = field(default_factory=list)
    layers: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # expert, alpha, used
    keep: bool = False  # fill `layers`, in evaluation


@dataclass
class Context:
    """What the layers of one stack share. real: [B, L], not padding. counted: [B, L], enters the
    router's losses and statistics. bias: [B, H, L, L]. memory: the encoder's output."""

    real: Tensor
    counted: Tensor
    bias: Tensor
    routing: Routing
    memory: Tensor | None = None
    memory_bias: Tensor | None = None


class RMSNorm(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def mask_dtype(x: Tensor) -> torch.dtype:
    """Attention wants its bias in the type of its queries; cast it once, not in every block."""
    return torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else torch.float32


def linear(n_in: int, n_out: int, std: float) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Attention(nn.Module):
    """T5 attention: no bias in the projections, no scaling of the scores."""

    def __init__(self, c: dict, has_position_bias: bool):
        super().__init__()
        d, self.heads, inner = c["d_model"], c["num_heads"], c["num_heads"] * c["d_kv"]
        self.q = linear(d, inner, (d * c["d_kv"]) ** -0.5)
        self.k, self.v = linear(d, inner, d**-0.5), linear(d, inner, d**-0.5)
        self.o = linear(inner, d, inner**-0.5)
        if has_position_bias:
            self.relative_attention_bias = nn.Embedding(BUCKETS, self.heads)
            nn.init.normal_(self.relative_attention_bias.weight, std=d**-0.5)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q(x), self.k(memory), self.v(memory))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class DenseFF(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.wi = linear(c["d_model"], c["d_ff"], c["d_model"] ** -0.5)
        self.wo = linear(c["d_ff"], c["d_model"], c["d_ff"] ** -0.5)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.wo(self.dropout(F.relu(self.wi(x))))


class Router(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.classifier = linear(c["d_model"], c["num_experts"], c["d_model"] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training:
                x = x * torch.empty_like(x).uniform_(0.99, 1.01)
            return self.classifier(x)


def rank_in_batch(expert: Tensor, experts: int) -> Tensor:
    """How many earlier entries of `expert` [N] (ids in 0..experts) have the same id."""
    order = expert.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=expert.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    first = counts.cumsum(0) - counts
    place = torch.arange(len(expert), device=expert.device) - first[expert[order]]
    return torch.empty_like(place).scatter_(0, order, place)


class SparseFF(nn.Module):
    capacity_factor = 2.0
    balance_weight, z_weight = 0.01, 1e-3  # Fedus et al. 2022
    idle_weight, sharpness = 0.03, 4.0

    def __init__(self, c: dict):
        super().__init__()
        e, d, f = c["num_experts"], c["d_model"], c["d_ff"]
        self.router = Router(c)
        self.wi = nn.Parameter(torch.randn(e, d, f) * d**-0.5)
        self.wo = nn.Parameter(torch.randn(e, f, d) * f**-0.5)
        self.dropout = nn.Dropout(0.0)

    def router_loss(self, logits: Tensor, prob: Tensor, expert: Tensor, counted: Tensor) -> Tensor:
        """The balance and z losses of Fedus et al., and one of our own against idle experts. Theirs
        hardly pulls on an expert that nobody chooses: its probability is small and flat. Ours
        raises the logarithm of the mean sharpened probability, whose gradient goes to the tokens
        that come closest to choosing the expert, the more so the less the expert really takes."""
        experts, weight = prob.size(1), counted.float() / counted.sum().clamp(min=1)
        share = torch.zeros_like(prob[0]).scatter_add_(0, expert, weight)
        balance = experts * (share * (weight @ prob)).sum()
        z = weight @ logits.logsumexp(-1).square()
        near = weight @ (self.sharpness * logits).softmax(-1)
        idle = -((experts * near + 1e-6).log() / (experts * share + 0.1)).mean()
        return self.balance_weight * balance + self.z_weight * z + self.idle_weight * idle

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        (batch, length, d), flat = x.shape, x.flatten(0, 1)
        tokens, experts, real = len(flat), len(self.wi), ctx.real.flatten()
        logits = self.router(flat)
        prob = logits.softmax(-1)
        alpha, expert = prob.max(-1)
        if self.training:
            ctx.routing.losses.append(self.router_loss(logits, prob, expert, ctx.counted.flatten()))
            capacity = math.ceil(self.capacity_factor * tokens / experts)
            rank = rank_in_batch(torch.where(real, expert, experts), experts)
            used = real & (rank < capacity)
        else:  # in each sequence, in token order; padding stands on the right
            one_hot = F.one_hot(expert.view(batch, length), experts)
            earlier = (one_hot.cumsum(1) * one_hot).sum(-1).flatten()
            used = real & (earlier <= EXPERT_CAPACITY)
            rank = rank_in_batch(torch.where(used, expert, experts), experts)
            capacity = int(torch.where(used, rank, 0).max()) + 1
        if ctx.routing.keep:
            ctx.routing.layers.append(tuple(t.view(batch, length) for t in (expert, alpha, used)))
        # An expert's tokens fill its row of slots; a token without a slot gets a row of its own
        # behind them, so that every shape is fixed and no two tokens write to one place.
        spare = experts * capacity + torch.arange(tokens, device=x.device)
        slot = torch.where(used, expert * capacity + rank, spare)
        slots = flat.new_zeros(experts * capacity + tokens, d).index_copy(0, slot, flat)
        hidden = F.relu(torch.bmm(slots[: experts * capacity].view(experts, capacity, d), self.wi))
        out = torch.bmm(self.dropout(hidden), self.wo).view(-1, d)
        out = F.pad(out, (0, 0, 0, tokens)).index_select(0, slot)
        return (out * alpha[:, None]).view(batch, length, d)


class SubLayer(nn.Module):
    """x + inner(norm(x)), where inner is stored under HF's name for it."""

    def __init__(self, d: int, name: str, inner: nn.Module):
        super().__init__()
        self.name, self.layer_norm, self.dropout = name, RMSNorm(d), nn.Dropout(0.0)
        self.add_module(name, inner)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        inner, n = getattr(self, self.name), self.layer_norm(x)
        if self.name == "mlp":
            y = inner(n, ctx)
        elif self.name == "SelfAttention":
            y = inner(n, n, ctx.bias)
        else:
            y = inner(n, ctx.memory, ctx.memory_bias)
        return x + self.dropout(y)


class Block(nn.Module):
    def __init__(self, c: dict, decoder: bool, first: bool, sparse: bool):
        super().__init__()
        layers = [("SelfAttention", Attention(c, first))]
        layers += [("EncDecAttention", Attention(c, False))] if decoder else []
        layers += [("mlp", (SparseFF if sparse else DenseFF)(c))]
        self.layer = nn.ModuleList(SubLayer(c["d_model"], *named) for named in layers)


class Stack(nn.Module):
    def __init__(self, c: dict, decoder: bool):
        super().__init__()
        n = c["num_decoder_layers" if decoder else "num_layers"]
        step = n // c["num_sparse_decoder_layers" if decoder else "num_sparse_encoder_layers"]
        self.decoder = decoder
        self.block = nn.ModuleList(
            Block(c, decoder, i == 0, i % step == 1 or step == 1) for i in range(n)
        )
        self.final_layer_norm, self.dropout = RMSNorm(c["d_model"]), nn.Dropout(0.0)

    def position_bias(self, length: int, device: torch.device) -> Tensor:
        """[1, H, L, L] from block 0's table; every block uses it."""
        i = torch.arange(length, device=device)
        rel = i[None, :] - i[:, None]
        n, offset = BUCKETS, torch.zeros_like(rel)
        if not self.decoder:
            n //= 2
            offset, rel = (rel > 0).long() * n, -rel.abs()
        r, exact = (-rel).clamp(min=0), n // 2
        far = torch.log(r.float().clamp(min=1) / exact) / math.log(FAR / exact) * (n - exact)
        bucket = offset + torch.where(r < exact, r, (exact + far.long()).clamp(max=n - 1))
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        return table(bucket).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = self.dropout(x)
        for block in self.block:
            for layer in block.layer:
                x = layer(x, ctx)
        return self.dropout(self.final_layer_norm(x))


class Switch(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.config = c
        self.shared = nn.Embedding(VOCAB, c["d_model"])  # std 1, tied to the head
        self.encoder, self.decoder = Stack(c, False), Stack(c, True)

    def encode(self, src: Tensor, routing: Routing) -> Tensor:
        real = src != PAD
        bias = self.encoder.position_bias(src.size(1), src.device)
        bias = bias + torch.where(real, 0.0, MASKED)[:, None, None]
        ctx = Context(real, real & (src != EOS), bias.to(mask_dtype(src)), routing)
        return self.encoder(self.shared(src), ctx)

    def decode(self, src: Tensor, memory: Tensor, tgt: Tensor, routing: Routing) -> Tensor:
        """Logits [B, T, V] of every target token given those before it."""
        inp, length = F.pad(tgt, (1, 0))[:, :-1], tgt.size(1)
        future = torch.full((length, length), MASKED, device=tgt.device).triu(1)
        bias = (self.decoder.position_bias(length, tgt.device) + future).to(mask_dtype(src))
        memory_bias = torch.where(src != PAD, 0.0, MASKED)[:, None, None].to(mask_dtype(src))
        ctx = Context(
            tgt != PAD,
            (tgt != PAD) & (inp > EOS),
            bias.expand(len(src), -1, -1, -1),
            routing,
            memory,
            memory_bias.expand(-1, 1, length, -1),
        )
        y = self.decoder(self.shared(inp), ctx)
        return F.linear(y * self.config["d_model"] ** -0.5, self.shared.weight)

    def forward(self, src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over real target tokens, and the sum of the routers' losses."""
        routing = Routing()
        logits = self.decode(src, self.encode(src, routing), tgt, routing)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tgt.flatten(), ignore_index=PAD)
        return loss, sum(routing.losses)

    def sparse(self) -> dict[str, SparseFF]:
        return {
            name.removesuffix(".mlp"): m
            for name, m in self.named_modules()
            if isinstance(m, SparseFF)
        }

    def set_dropout(self, dense: float, expert: float, edge: float) -> None:
        """dense: in every block. expert: inside experts. edge: at both ends of each stack."""
        for m in self.modules():
            if hasattr(m, "dropout"):
                kind = {SparseFF: expert, Stack: edge}
                m.dropout.p = kind.get(type(m), dense)


def tensors(model: Switch) -> dict[str, Tensor]:
    """Weights under Hugging Face's names, in bf16; experts one by one, transposed as nn.Linear."""
    out = {}
    for name, value in model.state_dict().items():
        if name.endswith((".mlp.wi", ".mlp.wo")):
            head, which = name.rsplit(".", 1)
            out |= {f"{head}.experts.expert_{e}.{which}.weight": w.t() for e, w in enumerate(value)}
        else:
            out[name] = value
    return {name: value.to(torch.bfloat16).contiguous().cpu() for name, value in out.items()}


def load_tensors(model: Switch, path: Path) -> dict[str, Tensor]:
    """The inverse of `tensors`: a state dict in fp32 from a directory that `save` wrote."""
    stored, out = load_file(path / "model.safetensors"), {}
    for name, value in model.state_dict().items():
        if name.endswith((".mlp.wi", ".mlp.wo")):
            head, which = name.rsplit(".", 1)
            parts = [stored[f"{head}.experts.expert_{e}.{which}.weight"] for e in range(len(value))]
            out[name] = torch.stack([part.t() for part in parts]).float()
        else:
            out[name] = stored[name].float()
    return out


def save(model: Switch, out: Path, report: dict) -> None:
    c = model.config
    config = {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "is_encoder_decoder": True,
        "vocab_size": VOCAB,
        **c,
        "encoder_sparse_step": c["num_layers"] // c["num_sparse_encoder_layers"],
        "decoder_sparse_step": c["num_decoder_layers"] // c["num_sparse_decoder_layers"],
        "expert_capacity": EXPERT_CAPACITY,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": 0.01,
        "router_ignore_padding_tokens": False,
        "add_router_probs": False,
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": FAR,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "dense_act_fn": "relu",
        "use_cache": True,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    save_file(tensors(model), out / "model.safetensors", metadata={"format": "pt"})
