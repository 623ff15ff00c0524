#!/usr/bin/env python3
"""Makes tests/parity/*: tiny random Switch Transformers checkpoints and what Transformers 4.57 (CPU,
fp32) answers on them. Development only; the results are committed.

A golden file holds fp32 tensors, ragged, without padding:
  input.ids [n], input.lengths [S], target.ids [m], target.lengths [S] (decoder inputs)
  {encoder,decoder}.L.{logits [tokens, E], expert [tokens], dropped [tokens]}   L-th MoE layer
  logits [m, vocabulary]   final logits, teacher-forced
  greedy [S, 32]           tokens of generate(use_cache=True, max_new_tokens=32)

Seeds are tried until no choice (expert, capacity, greedy token) hangs on a margin that rounding
could turn."""

import argparse
import json
import os
import shutil

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers import modeling_switch_transformers as switch

NEW_TOKENS = 32
MARGIN = 2e-3

BASE = dict(
    vocab_size=96,
    d_model=32,
    d_kv=8,
    num_heads=4,
    d_ff=32,
    num_layers=4,
    num_decoder_layers=4,
    num_sparse_encoder_layers=2,
    num_sparse_decoder_layers=2,
    num_experts=8,
    expert_capacity=64,
    decoder_start_token_id=0,
)

# name -> config changes, input lengths, target lengths, how it is stored
CASES = {
    "base": (dict(), [5, 12, 1, 30], [6, 9, 3, 1], "f32-copies"),
    "wide-heads": (dict(d_model=24, d_kv=16, num_heads=3, d_ff=40), [9, 17, 4], [5, 7, 8], "f32"),
    "every-layer": (
        dict(
            num_layers=3,
            num_decoder_layers=2,
            num_sparse_encoder_layers=3,
            num_sparse_decoder_layers=2,
            num_experts=5,
        ),
        [8, 21, 3],
        [4, 10, 6],
        "f32",
    ),
    "gated-untied": (
        dict(
            feed_forward_proj="gated-gelu",
            is_gated_act=True,
            dense_act_fn="gelu_new",
            tie_word_embeddings=False,
            d_model=48,
            num_heads=3,
            d_kv=12,
            d_ff=36,
            num_experts=4,
            num_layers=3,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
        ),
        [11, 6, 19],
        [8, 5, 2],
        "f32",
    ),
    "overflow": (
        dict(expert_capacity=3, num_experts=4, num_decoder_layers=2, num_sparse_decoder_layers=2),
        [150, 7, 41],
        [20, 2, 13],
        "f32",
    ),
    "dense-decoder": (
        dict(decoder_sparse_step=0, num_sparse_decoder_layers=0),
        [14, 2, 26],
        [7, 7, 7],
        "f32",
    ),
    "bf16-sharded": (dict(num_experts=6), [10, 3, 25, 16], [9, 4, 6, 12], "bf16"),
    "mixed-types": (
        dict(
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=4,
        ),
        [13, 5],
        [6, 11],
        "mixed",
    ),
}


class GatedDense(nn.Module):
    """T5's gated feed-forward, which Transformers' Switch lacks."""

    def __init__(self, config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.wo(transformers.activations.ACT2FN["gelu_new"](self.wi_0(x)) * self.wi_1(x))


# build() sets every weight itself.
switch.SwitchTransformersPreTrainedModel._init_weights = lambda self, module: None


def build(changes, seed, stored):
    plain = switch.SwitchTransformersDenseActDense
    dense = GatedDense if changes.get("is_gated_act") else plain
    switch.SwitchTransformersDenseActDense = dense
    switch.SwitchTransformersSparseMLP.__init__.__defaults__ = (dense,)
    config = SwitchTransformersConfig(**{**BASE, **changes})
    model = SwitchTransformersForConditionalGeneration(config)
    switch.SwitchTransformersDenseActDense = plain
    switch.SwitchTransformersSparseMLP.__init__.__defaults__ = (plain,)
    generator = torch.Generator().manual_seed(seed)
    done = set()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.data_ptr() in done:
                continue
            done.add(p.data_ptr())
            fan = p.shape[-1]
            if name == "decoder.final_layer_norm.weight":
                # Random signs: a tied head would otherwise repeat the last token for ever.
                p.copy_(torch.randn(p.shape, generator=generator) * 1.5)
            elif name.endswith("layer_norm.weight"):
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
            elif "relative_attention_bias" in name or name == "shared.weight":
                p.copy_(torch.randn(p.shape, generator=generator))
            elif "router" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 2 * fan**-0.5)
            else:
                scale = 0.7 if ".q." in name or ".k." in name else 1.0
                p.copy_(torch.randn(p.shape, generator=generator) * scale * fan**-0.5)
            if stored == "bf16":
                p.copy_(p.bfloat16())
            elif stored == "mixed":
                p.copy_(mixed_type(name, p).float())
    return model.eval()


def mixed_type(name, p):
    """A different type for some matrices, one expert's among them."""
    if "expert_1.wo" in name or "layer_norm" in name:
        return p.float()
    return p.half() if ".q." in name or "wi" in name or "shared" in name else p.bfloat16()


def ragged_ids(lengths, vocabulary, generator):
    return [torch.randint(2, vocabulary, (n,), generator=generator) for n in lengths]


def pad(rows):
    ids = torch.zeros(len(rows), max(len(r) for r in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        ids[i, : len(r)] = r
        mask[i, : len(r)] = 1
    return ids, mask


class Routers:
    """Records every router's logits and capacity mask of the next forward."""

    def __init__(self, model):
        self.out = {}
        for side in ("encoder", "decoder"):
            layer = 0
            for block in getattr(model, side).block:
                mlp = block.layer[-1].mlp
                if hasattr(mlp, "router"):
                    mlp.router.register_forward_hook(self.hook(f"{side}.{layer}"))
                    layer += 1

    def hook(self, key):
        def record(module, args, result):
            self.out[key] = (result[2].detach(), result[0].sum(-1) == 0)

        return record


def flat(padded, rows):
    return torch.cat([padded[i, : len(r)] for i, r in enumerate(rows)])


def margin(scores):
    top = scores.topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1]).min().item()


@torch.no_grad()
def goldens(model, inputs, targets):
    routers = Routers(model)
    ids, mask = pad(inputs)
    decoder_ids, decoder_mask = pad(targets)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=decoder_ids,
        decoder_attention_mask=decoder_mask,
        output_router_logits=False,
        use_cache=False,
    ).logits
    golden = {
        "input.ids": torch.cat(inputs),
        "input.lengths": torch.tensor([len(r) for r in inputs]),
        "target.ids": torch.cat(targets),
        "target.lengths": torch.tensor([len(r) for r in targets]),
        "logits": flat(logits, targets),
    }
    least = 1.0
    for key, (scores, dropped) in list(routers.out.items()):
        rows = inputs if key.startswith("encoder") else targets
        golden[f"{key}.logits"] = flat(scores, rows)
        golden[f"{key}.expert"] = flat(scores, rows).argmax(-1)
        golden[f"{key}.dropped"] = flat(dropped, rows)
        least = min(least, margin(flat(scores, rows)))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
        output_router_logits=False,
    )
    greedy = out.sequences[:, 1:]
    least = min(least, margin(torch.stack(out.scores)))
    golden["greedy"] = greedy
    sound = greedy.shape[1] == NEW_TOKENS and not (greedy == 1).any()
    varied = min(len(set(row.tolist())) for row in greedy)
    return {k: v.float().contiguous() for k, v in golden.items()}, least if sound else 0.0, varied


def store(model, folder, stored):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    model.config.architectures = ["SwitchTransformersForConditionalGeneration"]
    if stored == "bf16":
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
        os.remove(os.path.join(folder, "generation_config.json"))
        model.float()
        return
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if stored != "f32-copies":
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            del state[name]
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
    if stored == "mixed":
        state = {k: mixed_type(k, v) for k, v in state.items()}
    save_file(
        {k: v.clone().contiguous() for k, v in state.items()},
        os.path.join(folder, "model.safetensors"),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="tests/parity")
    parser.add_argument("names", nargs="*", help="cases; all by default")
    args = parser.parse_args()
    if not transformers.__version__.startswith("4.57."):
        parser.error(f"transformers {transformers.__version__}; goldens come from 4.57.x")
    torch.set_num_threads(1)
    for name, (changes, lengths, target_lengths, stored) in CASES.items():
        if args.names and name not in args.names:
            continue
        for seed in range(400):
            model = build(changes, seed, stored)
            generator = torch.Generator().manual_seed(1000 + seed)
            inputs = ragged_ids(lengths, model.config.vocab_size, generator)
            targets = ragged_ids(target_lengths, model.config.vocab_size, generator)
            for row in targets:
                row[0] = model.config.decoder_start_token_id
            golden, least, varied = goldens(model, inputs, targets)
            if least >= MARGIN and varied >= 3:
                break
        else:
            raise SystemExit(f"{name}: no seed without a close call")
        folder = os.path.join(args.out, name)
        store(model, folder, stored)
        save_file(
            golden,
            os.path.join(folder, "golden.safetensors"),
            metadata={"transformers": transformers.__version__, "seed": str(seed)},
        )
        dropped = sum(int(v.sum()) for k, v in golden.items() if k.endswith(".dropped"))
        print(
            json.dumps(
                {
                    "case": name,
                    "seed": seed,
                    "margin": round(least, 5),
                    "varied": varied,
                    "dropped": dropped,
                }
            )
        )


if __name__ == "__main__":
    main()
