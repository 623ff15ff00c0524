#!/usr/bin/env python3
"""Tracing with Hugging Face Transformers: a random Switch Transformer of a published size
(standard_hf.py's, with its routers), run over an SST-2 file with forward hooks on its routers.

What a trace needs of a batch (the top T log-probabilities over all experts and their ids) is
computed on the device and brought to the host; nothing is written. Texts are tokenised before the
clock starts; a batch is padded to its longest input, and tokens are counted without padding. A
sample is one batch, synchronised at both ends. With --write the same model is first left in a
folder that `sida trace` reads.

Prints JSON lines: a header, then one row.

  tools/bench/trace_hf.py --experts 128 --input train.tsv --write /dev/shm/base-128
  tools/bench/trace_hf.py --tiny --device cpu --input data/sample/inputs/reviews-test.tsv
"""

import argparse
import json
import os
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import sentencepiece
import standard_hf
import torch
import transformers

SAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../data/sample/model")
PROMPT, TARGETS, END = "sst2 sentence: ", ("negative", "positive"), 1  # data/corpus.h


# --- the folder


def config_of(model):
    """What both Transformers and sida read, whatever the version writes."""
    c = model.config
    copied = ["vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers"]
    copied += ["num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"]
    copied += ["num_experts", "expert_capacity", "layer_norm_epsilon"]
    copied += ["relative_attention_num_buckets", "relative_attention_max_distance"]
    fixed = {"architectures": [type(model).__name__], "model_type": "switch_transformers"}
    fixed |= {"is_encoder_decoder": True, "feed_forward_proj": "relu", "router_dtype": "float32"}
    fixed |= {"pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0}
    return fixed | {name: getattr(c, name) for name in copied}


def write_model(model, folder):
    """safetensors by hand: tensors go to the file straight from the device, several at a time."""
    os.makedirs(folder, exist_ok=True)
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    header, plan, seen, at = {}, [], set(), 0
    for name, p in model.named_parameters():
        if p.data_ptr() in seen:  # tied
            continue
        seen.add(p.data_ptr())
        size = p.numel() * p.element_size()
        header[name] = {"dtype": names[p.dtype], "shape": list(p.shape)}
        header[name]["data_offsets"] = [at, at + size]
        plan.append((p, at))
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = os.path.join(folder, "model.safetensors")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)

        def put(job):
            p, offset = job
            raw = p.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
            data = memoryview(raw)
            while data:
                written = os.pwrite(file.fileno(), data, 8 + len(text) + offset)
                data, offset = data[written:], offset + written

        file.flush()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, plan))
    config = config_of(model) | {"tie_word_embeddings": "lm_head.weight" not in header}
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
    shutil.copy(os.path.join(SAMPLE, "spiece.model"), folder)
    return at


# --- the text


def read_records(path, limit):
    """(input ids, target ids) of each row."""
    tokenizer = sentencepiece.SentencePieceProcessor(os.path.join(SAMPLE, "spiece.model"))
    targets = [tokenizer.encode(text) + [END] for text in TARGETS]
    with open(path, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1 : limit + 1]
    return [(tokenizer.encode(PROMPT + text) + [END], targets[int(label)]) for text, label in rows]


def padded(rows, device):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def make_batch(records, device):
    ids, mask = padded([source for source, _ in records], device)
    start, _ = padded([[0] + target[:-1] for _, target in records], device)
    tokens = sum(len(source) + len(target) for source, target in records)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": start}
    return inputs, tokens


# --- measuring


class Routers:
    """Hooks on the routers' linear layers: logits a MoE layer, by side."""

    def __init__(self, model, top):
        self.top, self.logits = top, {"encoder": [], "decoder": []}
        for name, module in model.named_modules():
            if name.endswith("router.classifier"):
                module.register_forward_hook(self.hook(name.split(".")[0]))

    def hook(self, side):
        return lambda module, inputs, output: self.logits[side].append(output.detach())

    def collect(self):
        """The top T of all layers on the host; forgets the logits."""
        found = []
        for side in self.logits.values():
            logits = torch.stack([t.reshape(-1, t.shape[-1]) for t in side], 1).float()
            logp, ids = logits.log_softmax(-1).topk(min(self.top, logits.shape[-1]), -1)
            found.append((ids.to(torch.int16).cpu(), logp.half().cpu()))
            side.clear()
        return found


def measure(args, model, device):
    records = read_records(args.input, args.batch * (args.warmup + args.runs))
    routers = Routers(model, args.top)
    samples, counts = [], []
    with torch.inference_mode():
        for i in range(args.warmup + args.runs):
            cut = [records[j % len(records)] for j in range(i * args.batch, (i + 1) * args.batch)]
            inputs, tokens = make_batch(cut, args.device)
            device.wait()
            begin = time.perf_counter()
            model(**inputs, use_cache=False, output_router_logits=False)
            found = routers.collect()
            device.wait()
            if i >= args.warmup:
                samples.append((time.perf_counter() - begin) * 1e3)
                counts.append(tokens)
    if not all(bool(torch.isfinite(logp.float()).all()) for _, logp in found):
        raise RuntimeError("the routers' log-probabilities are not finite")
    layers = [ids.shape[1] for ids, _ in found]
    rate = sum(counts) / sum(samples) * 1e3
    return {"moe_layers": layers, "tokens_per_s": rate, "tokens": counts, "samples_ms": samples}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--experts", type=int, default=128)
    add("--input", required=True, help="SST-2's format: sentence<TAB>label behind a header")
    add("--write", metavar="DIR", help="leave the model there")
    add("--batch", type=int, default=16)
    add("--top", type=int, default=30)
    add("--runs", type=int, default=12)
    add("--warmup", type=int, default=2)
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="a small geometry, to try the script")
    args = parser.parse_args()
    args.routing = "histogram"
    args.budget_gib = None
    if min(args.runs, args.warmup, args.batch) < 1:
        parser.error("--runs, --warmup and --batch are at least 1")
    return args


def main():
    args = parse()
    transformers.logging.set_verbosity_error()
    standard_hf.TINY["vocab_size"] = standard_hf.BASE["vocab_size"]  # the sample's tokeniser
    device = standard_hf.Device(args.device)
    if device.cuda and not torch.cuda.is_available():
        raise SystemExit("trace_hf.py: PyTorch finds no GPU; --device cpu runs without one")
    standard_hf.say(standard_hf.header(args, device))
    begin = time.perf_counter()
    model = standard_hf.build(args, args.experts, getattr(torch, args.dtype))
    row = {"kind": "row", "experts": args.experts, "dtype": args.dtype, "batch": args.batch}
    row["build_seconds"] = time.perf_counter() - begin
    if args.write:
        begin = time.perf_counter()
        row["model_bytes"] = write_model(model, args.write)
        row["write_seconds"] = time.perf_counter() - begin
    standard_hf.say(row | measure(args, model, device) | device.memory())
    return 0


if __name__ == "__main__":
    sys.exit(main())
