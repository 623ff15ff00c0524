#!/usr/bin/env python3
"""Makes a tiny checkpoint of a decoder-only MoE family, with random weights from a seed.

    tools/reference/make_tiny_moe.py FAMILY DIRECTORY [--seed N]

FAMILY: mixtral (8 experts, top 2), olmoe (32, top 8), qwen3_moe (16, top 4) or granitemoe (12, top 3).
Two layers of width 32, a vocabulary of 256: token ids are bytes. Weights are wider than a fresh
model's, so that routing is decided: which experts a token gets depends on the token and, through
attention, on those before it. For tests and demonstrations; no such model says anything.

Needs: torch 2, transformers 4.57.
"""
import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
              tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)
FAMILIES = {
    "mixtral": dict(intermediate_size=48, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": dict(intermediate_size=24, num_experts=32, num_experts_per_tok=8,
                  norm_topk_prob=False),
    "qwen3_moe": dict(intermediate_size=48, moe_intermediate_size=24, head_dim=8, num_experts=16,
                      num_experts_per_tok=4, norm_topk_prob=True, decoder_sparse_step=1,
                      mlp_only_layers=[]),
    "granitemoe": dict(intermediate_size=24, num_local_experts=12, num_experts_per_tok=3,
                       embedding_multiplier=3.0, attention_multiplier=0.35),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(args.family, **COMMON, **FAMILIES[args.family])
    AutoModelForCausalLM.from_config(config).save_pretrained(args.directory)


main()
