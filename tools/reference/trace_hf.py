#!/usr/bin/env python3
"""Writes a trace of a decoder-only MoE language model of Hugging Face Transformers.

    tools/reference/trace_hf.py --model DIRECTORY --input FILE --output TRACE.h5

FILE: one sequence a line, blank lines are skipped. Text goes through the model's tokenizer, or is
taken as ids: --tokens bytes (an id is a byte of UTF-8) or --tokens ids (whole numbers).
The schema is in formats/README.md; `sida inspect --check`, `sida train` and `sida eval` take it.

A router is a module called `gate` or `router` with a score an expert, inside a block that has
experts; it is hooked while the model runs. Probabilities are the softmax of its scores over all
experts, chosen are the top k, the factors are their probabilities, renormalised over the chosen or
not: the first batch decides, by computing every block's output from its experts both ways, and a
model that fits neither is refused. Where the experts cannot be called one by one, --renormalise says
which it is. Nothing is dropped: these models have no capacity. Seen with Mixtral, OLMoE, Qwen3-MoE
and GraniteMoe of transformers 4.57.

Needs: torch 2, transformers, h5py, numpy, xxhash.
"""
import argparse
import json
import mmap
import os
import sys

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import xxhash


def fail(reason):
    sys.exit(f"trace_hf: {reason}")


# --- fingerprints: those that sida itself computes of the same files


def file_fingerprint(path):
    with open(path, "rb") as file:
        state = xxhash.xxh3_128()
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def model_fingerprint(directory):
    """XXH3-128 of config.json's length and bytes, then of every tensor by name: name, type, rank,
    extents (room for four), values."""
    state = xxhash.xxh3_128()
    with open(os.path.join(directory, "config.json"), "rb") as file:
        config = file.read()
    state.update(np.uint64(len(config)).tobytes() + config)
    files = ["model.safetensors"]
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.exists(os.path.join(directory, files[0])) and os.path.exists(index):
        with open(index) as file:
            files = sorted(set(json.load(file)["weight_map"].values()))
    tensors = {}
    for name in files:
        with open(os.path.join(directory, name), "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        for key, about in json.loads(data[8:start]).items():
            if key != "__metadata__":
                tensors[key.encode()] = (about, data, start)
    for key in sorted(tensors):
        about, data, start = tensors[key]
        shape = about["shape"]
        extents = np.zeros(5, np.int64)
        extents[:1 + len(shape)] = [len(shape)] + shape
        state.update(key + b"\0" + about["dtype"].encode() + b"\0" + extents.tobytes())
        begin, end = about["data_offsets"]
        for at in range(begin, end, 1 << 24):
            state.update(data[start + at:start + min(at + (1 << 24), end)])
    return state.hexdigest()


# --- the model


def expert_output(block, expert, x):
    """What one expert makes of rows x; None when the block has no experts that are known here."""
    experts = getattr(block, "experts", None)
    if isinstance(experts, torch.nn.ModuleList):
        return experts[expert](x)
    if hasattr(block, "input_linear") and hasattr(block, "output_linear"):
        gate, up = F.linear(x, block.input_linear.weight[expert]).chunk(2, dim=-1)
        return F.linear(block.activation(gate) * up, block.output_linear.weight[expert])
    return None


class Router:
    """One MoE layer: where its router is, and what it said in the last forward call."""

    def __init__(self, name, gate, block, experts, top_k):
        self.name, self.block, self.experts, self.top_k = name, block, experts, top_k
        self.logits = self.x = self.y = None
        gate.register_forward_hook(self.keep_logits)
        block.register_forward_hook(self.keep_block)

    def keep_logits(self, module, inputs, output):
        found = output if isinstance(output, tuple) else (output,)
        found = [t for t in found if torch.is_tensor(t) and t.is_floating_point()
                 and t.ndim >= 2 and t.shape[-1] == self.experts]
        if not found:
            fail(f"{self.name}: no scores of {self.experts} experts in its output")
        self.logits = found[0].reshape(-1, self.experts).float()

    def keep_block(self, module, inputs, output):
        self.x = inputs[0].reshape(-1, inputs[0].shape[-1])
        self.y = (output[0] if isinstance(output, tuple) else output).reshape(self.x.shape)

    def choose(self, renormalise):
        """Chosen experts and factors, [n, k]: as the models do it, ties as torch.topk has them."""
        alpha, chosen = torch.topk(torch.softmax(self.logits, -1), self.top_k, dim=-1)
        return chosen, alpha / alpha.sum(-1, keepdim=True) if renormalise else alpha

    def error(self, renormalise):
        """How far the block's output is from the sum that the factors give; None: cannot tell."""
        if self.x is None:
            return None
        chosen, alpha = self.choose(renormalise)
        y = torch.zeros_like(self.x)
        for expert in range(self.experts):
            rows, rank = torch.where(chosen == expert)
            if len(rows) == 0:
                continue
            out = expert_output(self.block, expert, self.x[rows])
            if out is None:
                return None
            y.index_add_(0, rows, (out * alpha[rows, rank, None].to(out.dtype)).to(y.dtype))
        return float((y.float() - self.y.float()).norm() / self.y.float().norm())


def find_routers(model):
    config, routers = model.config, []
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        linear = getattr(module, "layer", module)
        weight = getattr(linear, "weight", None)
        if leaf not in ("gate", "router") or weight is None or weight.ndim != 2:
            continue
        block = model.get_submodule(parent)
        if not any(hasattr(block, part) for part in ("experts", "input_linear")):
            continue
        for owner in (block, module, config):
            top_k = getattr(owner, "top_k", None) or getattr(owner, "num_experts_per_tok", None)
            if top_k:
                break
        else:
            fail(f"{name}: no top_k there, and no num_experts_per_tok in the configuration")
        routers.append(Router(name, module, block, weight.shape[0], top_k))
    if not routers:
        fail("no router found: no module called gate or router in a block with experts")
    if len({(r.experts, r.top_k) for r in routers}) > 1:
        fail("layers with different numbers of experts: the schema has one for all")
    return routers


def decide(routers, dtype):
    """Whether factors are renormalised, from the first batch."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    errors = {way: [r.error(way) for r in routers] for way in (True, False)}
    if None in errors[True]:
        fail("the experts cannot be called one by one: say --renormalise yes or no")
    worst = {way: max(errors[way]) for way in errors}
    best = min(worst, key=worst.get)
    if not worst[best] <= tolerance:
        fail(f"its MoE layers compute neither the plain nor the renormalised sum of their top "
             f"experts (relative error {worst[best]:.2g}): not a routing that is known here; where "
             f"something else is added, such as shared experts, say --renormalise yes or no")
    return best, worst[best]


# --- the trace


class Output:
    """An HDF5 file that appears under its name when it is complete."""

    def __init__(self, path):
        self.path, self.temporary = path, path + ".tmp"
        # What libhdf5 1.10 reads.
        self.file = h5py.File(self.temporary, "w", libver=("v110", "v110"))

    def append(self, name, values):
        if name not in self.file:
            row = max(1, values[:1].nbytes)
            self.file.create_dataset(
                name, shape=(0,) + values.shape[1:], maxshape=(None,) + values.shape[1:],
                dtype=values.dtype, chunks=(max(1, (1 << 20) // row),) + values.shape[1:],
                compression="gzip", compression_opts=9, shuffle=True)
        data = self.file[name]
        data.resize(len(data) + len(values), axis=0)
        data[len(data) - len(values):] = values

    def finish(self, attributes):
        self.file.attrs.update(attributes)
        self.file.close()
        os.replace(self.temporary, self.path)


def read_sequences(args):
    tokenizer = None
    if args.tokens == "tokenizer":
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    with open(args.input, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            if tokenizer:
                ids = tokenizer(line)["input_ids"]
            elif args.tokens == "bytes":
                ids = list(line.encode())
            else:
                ids = [int(word) for word in line.split()]
            yield number, ids[:args.max_tokens]


def tokenizer_fingerprint(args):
    if args.tokens != "tokenizer":
        return xxhash.xxh3_128(args.tokens.encode()).hexdigest()
    directory = args.tokenizer or args.model
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model"):
        if os.path.exists(os.path.join(directory, name)):
            return file_fingerprint(os.path.join(directory, name))
    return fail(f"{directory}: no tokenizer.json, tokenizer.model or spiece.model")


@torch.no_grad()
def trace(args):
    if not os.path.isdir(args.model):
        fail(f"{args.model}: not a model's directory")
    if transformers.AutoConfig.from_pretrained(args.model).is_encoder_decoder:
        fail(f"{args.model}: an encoder-decoder; this is for decoder-only models")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    routers = find_routers(model)
    experts, top_k = routers[0].experts, routers[0].top_k
    top = args.top or min(experts, max(30, 2 * top_k))
    if not top_k <= top <= experts:
        fail(f"--top {top}: the model chooses {top_k} of {experts} experts")
    embedding = model.get_input_embeddings().weight
    renormalise = None if args.renormalise is None else args.renormalise == "yes"
    error = None
    out = Output(args.output)
    lines, lengths, occurs = [], [], set()

    def run(batch):
        nonlocal renormalise, error
        longest = max(len(ids) for _, ids in batch)
        # Causal: what is padded on the right changes nothing before it, and is cut off again.
        rows = torch.zeros((len(batch), longest), dtype=torch.long)
        real = torch.zeros((len(batch), longest), dtype=torch.bool)
        for i, (number, ids) in enumerate(batch):
            if max(ids) >= len(embedding) or min(ids) < 0:
                fail(f"{args.input}:{number}: a token outside of the {len(embedding)} rows of the "
                     f"embedding")
            rows[i, :len(ids)] = torch.tensor(ids)
            real[i, :len(ids)] = True
        model(input_ids=rows.to(args.device), attention_mask=real.long().to(args.device))
        if renormalise is None:
            renormalise, error = decide(routers, model.dtype)
        keep, n = real.flatten().to(args.device), int(real.sum())
        columns = {"experts": [], "alpha": [], "top_ids": [], "top_logp": []}
        for router in routers:
            if not torch.isfinite(router.logits[keep]).all():
                fail(f"{args.input}:{batch[0][0]}: {router.name} has scores that are not finite")
            chosen, alpha = router.choose(renormalise)
            logp, ids = torch.sort(torch.log_softmax(router.logits, -1), dim=-1, descending=True,
                                   stable=True)  # ties to the lower id
            # fp16 has no log-probability below -65504.
            logp = logp[keep, :top].clamp(min=-65504)
            for name, values, dtype in (("experts", chosen[keep], np.uint16),
                                        ("alpha", alpha[keep], np.float32),
                                        ("top_ids", ids[keep, :top], np.uint16),
                                        ("top_logp", logp, np.float16)):
                columns[name].append(values.cpu().numpy().astype(dtype))
        for name, layers in columns.items():
            out.append(f"decoder/{name}", np.stack(layers, axis=1))
        out.append("decoder/dropped", np.zeros((n, len(routers)), np.uint8))
        tokens = rows[real].numpy().astype(np.int32)
        out.append("decoder/tokens", tokens)
        occurs.update(tokens.tolist())
        lines.extend(number for number, _ in batch)
        lengths.extend(len(ids) for _, ids in batch)

    batch = []
    for number, ids in read_sequences(args):
        if args.limit and len(lines) + len(batch) >= args.limit:
            break
        if ids:
            batch.append((number, ids))
        if len(batch) == args.batch:
            run(batch)
            batch = []
    if batch:
        run(batch)
    if not lines:
        fail(f"{args.input}: no tokens")
    ids = np.array(sorted(occurs), np.int32)
    out.append("decoder/offsets", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    out.append("sequence/line", np.array(lines, np.int64))
    out.append("sequence/label", np.full(len(lines), -1, np.int32))
    out.append("sequence/generated", np.zeros(len(lines), np.uint8))
    out.append("embedding/ids", ids)
    out.append("embedding/rows",
               embedding[torch.from_numpy(ids).long()].float().cpu().numpy())
    with open(os.path.join(args.model, "config.json"), encoding="utf-8") as file:
        config = file.read()
    options = {"writer": "trace_hf.py", "tokens": args.tokens, "max_tokens": args.max_tokens,
               "limit": args.limit, "dtype": args.dtype, "renormalised": renormalise,
               "torch": torch.__version__, "transformers": transformers.__version__}
    out.finish({
        "format": "sida-trace", "version": 1, "model": model_fingerprint(args.model),
        "tokenizer": tokenizer_fingerprint(args), "input": file_fingerprint(args.input),
        "config": config, "options": json.dumps(options), "family": model.config.model_type,
        "experts": experts, "top_k": top_k, "top": top, "layers_encoder": 0,
        "layers_decoder": len(routers), "d_model": embedding.shape[1],
        "vocabulary": embedding.shape[0]})
    how = "renormalised" if renormalise else "not renormalised"
    proof = "as told" if error is None else f"outputs rebuilt to {error:.1e}"
    print(f"{args.output}: {model.config.model_type}, {len(lines)} sequences, {sum(lengths)} tokens, "
          f"{len(routers)} MoE layers, {top_k} of {experts} experts, factors {how} ({proof})",
          file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a checkpoint (safetensors)")
    parser.add_argument("--input", required=True, help="one sequence a line")
    parser.add_argument("--output", required=True, help="the trace")
    parser.add_argument("--tokens", choices=("tokenizer", "bytes", "ids"), default="tokenizer")
    parser.add_argument("--tokenizer", help="its directory (the model's)")
    parser.add_argument("--top", type=int, default=0,
                        help="log-probabilities kept a token and layer (30, or 2 k, at most E)")
    parser.add_argument("--renormalise", choices=("yes", "no"),
                        help="whether factors are divided by their sum over the chosen experts "
                        "(found out where that is possible)")
    parser.add_argument("--limit", type=int, default=0, help="sequences (all)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="a longer sequence is cut")
    parser.add_argument("--batch", type=int, default=8, help="sequences a forward call")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    try:
        trace(args)
    finally:
        if os.path.exists(args.output + ".tmp"):
            os.remove(args.output + ".tmp")


main()
