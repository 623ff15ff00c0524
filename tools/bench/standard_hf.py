#!/usr/bin/env python3
"""Standard: Hugging Face Transformers' Switch Transformers on a GPU, timed. tools/bench/gpu runs it.

Builds a Switch-Base of --experts experts a layer in the published geometry with random weights, on
the device, and times one forward pass of one decoder token over random token ids: eager attention,
inference_mode, no caches kept, router losses off. The ids lie on the device before the clock starts
and the logits stay there (sida's own figures include both transfers). All samples are printed.

Routing. Transformers' own random routers spread tokens almost evenly, a trained model's do not, and
Standard's time grows with the number of experts that a batch touches. So --routing histogram, the
default, makes routers as sida's synthetic models have them (runtime/model/synthetic.c): shares by
rank from runtime/model/routing_histogram.h, gains fitted to normal draws, an embedding that is large
beside what the blocks add, so that the choice is the token's. The numbers drawn are others than
sida's, so the experts are not the same ones: `experts_touched`, distinct experts that computed, is
counted in a pass of its own that is not timed, a layer and in all, and can be set beside sida's.
--routing random leaves the routers as Transformers makes them.

--budget-gib G keeps at most G GiB of weights on the GPU and leaves the rest to Accelerate's hooks
(dispatch_model with an inferred device map), which copy what a module needs when it is called.

Runs with transformers 4.57 and 5.17. What differs there: 4.57 computes router losses in every
forward unless told not to; 5.17 gathers tokens of a batch before routing, and its capacity drops
nothing. Prints JSON lines: one header, then a row a (type, experts, batch, length), or a line with
"failed" and the reason; exits with 1 if there is one.

  tools/bench/standard_hf.py --experts 8 128 256 --dtype bfloat16 float32 --lengths 25 60 300
  tools/bench/standard_hf.py --experts 128 --budget-gib 3.6 --runs 4 --warmup 1
  tools/bench/standard_hf.py --tiny --device cpu --experts 16 --runs 2     # does it run at all?
"""

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time

import torch
import transformers
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

BASE = dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12)
TINY = dict(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=4)
HISTOGRAM = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "../../runtime/model/routing_histogram.h"
)
EMBEDDING_DEVIATION = 12  # as synthetic.c's
HIGHEST_LOGIT = 6  # likewise: the mean of a token's highest router logit


def say(line):
    print(json.dumps(line), flush=True)


# --- the routers


def histogram_shares(experts):
    """Shares of tokens by rank: the histogram read at (rank + 1/2) / experts, adding up to 1."""
    with open(HISTOGRAM, encoding="utf-8") as file:
        body = re.search(r"\{\s*([\d.,\s]+)\}", file.read()).group(1)
    known = [float(x) for x in body.replace(",", " ").split()]
    shares = []
    for rank in range(experts):
        at = min(max((rank + 0.5) / experts * len(known) - 0.5, 0), len(known) - 1)
        low = int(at)
        high = min(low + 1, len(known) - 1)
        shares.append(known[low] + (at - low) * (known[high] - known[low]))
    return [share / sum(shares) for share in shares]


def fit_gains(experts, device, generator):
    """Gains by rank so that rank r wins its share when each rank's normal draw is multiplied."""
    samples = max(256, min(1 << 14, (1 << 22) // experts))
    normals = torch.randn(samples, experts, device=device, generator=generator)
    target = torch.tensor(histogram_shares(experts), device=device)
    gains = torch.ones(experts, device=device)
    for step in [0.2] * 40 + [0.05] * 41:
        values, winners = (normals * gains).max(dim=1)
        share = (torch.bincount(winners, minlength=experts) + 0.5) / samples
        mean = values.mean()
        gains = (gains / mean * ((target + 0.5 / samples) / share) ** step).clamp(max=1e3)
    mean = (normals * gains).max(dim=1).values.mean()
    return gains * HIGHEST_LOGIT / mean


@torch.no_grad()
def skew_routers(model, experts, device):
    generator = torch.Generator(device=device).manual_seed(1)
    gains = fit_gains(experts, device, generator)
    model.shared.weight.normal_(0, EMBEDDING_DEVIATION, generator=generator)
    for name, module in model.named_modules():
        if not name.endswith("router"):
            continue
        weight = module.classifier.weight
        ranks = torch.randperm(experts, device=device, generator=generator)
        rows = torch.randn(weight.shape, device=device, generator=generator)
        weight.copy_(rows * (gains[ranks] / math.sqrt(weight.shape[1]))[:, None])


# --- the model


def build(args, experts, dtype):
    geometry = TINY if args.tiny else BASE
    layers = geometry["num_layers"]
    config = SwitchTransformersConfig(
        num_decoder_layers=layers,
        num_sparse_encoder_layers=layers // 2,
        num_sparse_decoder_layers=layers // 2,
        num_experts=experts,
        expert_capacity=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **geometry,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(args.device):
            model = SwitchTransformersForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if args.routing == "histogram":
        skew_routers(model, experts, args.device)
    return model.eval()


def offload(model, budget_gib):
    """The rest of the weights goes to host memory; hooks copy it in when it is needed."""
    from accelerate import dispatch_model, infer_auto_device_map

    model.to("cpu")
    torch.cuda.empty_cache()
    limits = {0: int(budget_gib * 2**30), "cpu": 1 << 40}
    split = list(model._no_split_modules)
    device_map = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=split)
    on_gpu = sum(1 for place in device_map.values() if place == 0)
    return dispatch_model(model, device_map, main_device=0), f"{on_gpu} of {len(device_map)}"


# --- measuring


class Device:
    """What differs between a GPU and the CPU, where there is nothing to wait for or to ask."""

    def __init__(self, name):
        self.cuda = torch.device(name).type == "cuda"

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def forget(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self):
        """The caching allocator gives nothing back in between, so what the driver counts as used
        after the runs is the peak; other processes' memory would be in it."""
        if not self.cuda:
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "torch_bytes_peak": torch.cuda.max_memory_allocated(),
            "driver_bytes_peak": total - free,
        }


def forward(model, ids, start):
    return model(
        input_ids=ids, decoder_input_ids=start, use_cache=False, output_router_logits=False
    )


def count_experts(model, inputs, start):
    """Distinct experts that computed, a MoE layer, mean over the inputs."""
    layers, seen, handles = {}, set(), []
    for name, module in model.named_modules():
        match = re.fullmatch(r"(.*\.experts)\.expert_\d+", name)
        if match:
            layers.setdefault(match.group(1), 0)
            hook = lambda *_, name=name: seen.add(name)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    for ids in inputs:
        seen.clear()
        forward(model, ids, start)
        for name in seen:
            layers[name.rsplit(".", 1)[0]] += 1
    for handle in handles:
        handle.remove()
    return [count / len(inputs) for count in layers.values()]


def measure(args, model, device, batch, length):
    generator = torch.Generator().manual_seed(7)
    end = min(32000, model.config.vocab_size)
    inputs = [
        torch.randint(3, end, (batch, length), generator=generator).to(args.device)
        for _ in range(args.warmup + args.runs)
    ]
    start = torch.zeros(batch, 1, dtype=torch.long, device=args.device)
    samples = []
    device.forget()
    with torch.inference_mode():
        for i, ids in enumerate(inputs):
            device.wait()
            begin = time.perf_counter()
            out = forward(model, ids, start)
            device.wait()
            if i >= args.warmup:
                samples.append((time.perf_counter() - begin) * 1e3)
        if not bool(torch.isfinite(out.logits).all()):
            raise RuntimeError("the logits are not finite")
        memory = device.memory()
        touched = count_experts(model, inputs[args.warmup :][: args.count], start)
    median = statistics.median(samples)
    return {
        "batch": batch,
        "length": length,
        "latency_ms": median,
        "tokens_per_s": batch * length / median * 1e3,
        "experts_touched": sum(touched),
        "experts_touched_a_layer": touched,
        **memory,
        "samples_ms": samples,
    }


def header(args, device):
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    try:
        import accelerate

        versions["accelerate"] = accelerate.__version__
    except ImportError:
        pass
    line = {"kind": "header", "versions": versions, "device": "cpu", "routing": args.routing}
    if device.cuda:
        line["device"] = torch.cuda.get_device_name()
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = torch.backends.cudnn.version()
        line["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return line


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128, 256])
    types = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=types, nargs="+", default=["bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[25, 60, 300])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences a batch")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--count", type=int, default=3, help="inputs whose experts are counted")
    parser.add_argument("--routing", choices=["histogram", "random"], default="histogram")
    parser.add_argument("--budget-gib", type=float, help="offload with Accelerate")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small geometry, to try the script")
    args = parser.parse_args()
    if min(args.runs, args.warmup, args.count) < 1:
        parser.error("--runs, --warmup and --count are at least 1")
    if args.budget_gib and not args.device.startswith("cuda"):
        parser.error("--budget-gib needs a GPU")
    return args


def main():
    args = parse()
    transformers.logging.set_verbosity_error()
    device = Device(args.device)
    if device.cuda and not torch.cuda.is_available():
        raise SystemExit("standard_hf.py: PyTorch finds no GPU; --device cpu runs without one")
    say(header(args, device))
    failed = 0
    for dtype in args.dtype:
        for experts in args.experts:
            case = {"kind": "row", "dtype": dtype, "experts": experts}
            model = None
            try:
                begin = time.perf_counter()
                model = build(args, experts, getattr(torch, dtype))
                if args.budget_gib:
                    model, case["modules_on_gpu"] = offload(model, args.budget_gib)
                    case["budget_gib"] = args.budget_gib
                case["build_seconds"] = time.perf_counter() - begin
                case["attention"] = getattr(model.config, "_attn_implementation", None)
                for batch in args.batch:
                    for length in args.lengths:
                        say(case | measure(args, model, device, batch, length))
            except Exception as error:  # out of memory, say: the next case may still run
                failed += 1
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                say(case | {"kind": "failed", "failed": reason})
            del model
            device.forget()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
