"""The tables of a results file of tools/bench/gpu-train, for tools/bench/report."""

from gpu_results import times_faster
from tables import Goals, cell, markdown, print_failures, print_sections
from train_results import CLASSES, idle

PAPER = "l1-renorm"


def over(ours, theirs):
    return ours.ms / theirs.ms if ours and theirs else None


def step_goals(g, r, experts, length, tkd):
    what = f"E={experts}, L={length}"
    ours, best = r.sida(experts, length, tkd), r.best_torch(experts, length, tkd)
    goal, least = {32: (4, 2.5), 64: (4, 2.5), 512: (2, 1.5)}.get(length, (None, None))
    g.add(f"{what}: tokens/s against PyTorch's best way", times_faster(ours, best), goal, least)
    for count, names in (
        ("own count", ("device_bytes_peak", "torch_bytes_peak")),
        ("the driver's", ("driver_bytes_peak", "driver_bytes_peak")),
    ):
        share = r.memory_share(experts, length, tkd, *names)
        g.add(f"{what}: peak memory over PyTorch's lowest, {count}", share, None, 0.5, "of")
    way, alone = r.lstm(length)
    g.add(f"{what}: step / LSTM alone on cuDNN ({way})", over(ours, alone), None, 1.4, "of")
    shares = r.shares(experts, length)
    g.add(f"{what}: idle", shares and shares["idle"], None, 0.05, "most")


def goals(r):
    g = Goals()
    for experts, length, tkd in r.keys():
        if tkd == PAPER:
            step_goals(g, r, experts, length, tkd)
    traced = r.single.get("trace", {})
    g.add("tracing against the forward alone", r.trace_ratio("dry-run"), None, 0.9, "share")
    g.add("tracing against Transformers with hooks", r.trace_ratio("hooks"), None, 10)
    g.add("bytes a traced token", traced.get("bytes_per_token"), None, 800, "bytes")
    train, theirs = r.single.get("train", {}), r.single.get("torch-train", {})
    g.add("from a trace to a predictor, whole process", train.get("wall_seconds"), kind="s")
    both = train.get("seconds"), theirs.get("seconds")
    ratio = both[1] / both[0] if all(both) else None
    g.add("from a trace to a predictor, training alone: against PyTorch", ratio)
    return g.lines


def mib(case, name):
    value = case.row.get(name) if case else None
    return cell(value / 2**20 if value else None, "{:,.0f}")


def step_table(r):
    ways = ["eager", "tf32", "compile"]
    head = ["E", "tokens", "loss", "sida, ms", "tokens/s", "with its end, ms", "fp32, ms"]
    head += [f"PyTorch {way}, ms" for way in ways] + ["× the best", "LSTM alone, ms", "by", "our LSTM alone, ms"]
    rows = []
    for experts, length, tkd in r.keys():
        ours, theirs = r.sida(experts, length, tkd), r.torch(experts, length, tkd)
        exact, (way, alone) = r.sida(experts, length, tkd, "sida-fp32"), r.lstm(length)
        _, own = r.lstm(length, own=True)
        line = [str(experts), str(length), tkd, cell(ours.ms, "{:.3f}")]
        line += [cell(ours.tokens_per_s, "{:,.0f}"), cell(ours.row["with_finish_ms"], "{:.3f}")]
        line += [cell(exact and exact.ms, "{:.3f}")]
        line += [cell(theirs[way].ms if way in theirs else None, "{:.3f}") for way in ways]
        line += [cell(times_faster(ours, r.best_torch(experts, length, tkd)))]
        line += [cell(alone and alone.ms, "{:.3f}"), way or "", cell(own and own.ms, "{:.3f}")]
        rows.append(line)
    return head, rows


def lstm_table(r):
    rows = []
    for key in sorted(key for key in r.cases if key.experts == 0):
        way = key.system.removeprefix("lstm-")
        rows.append([way, str(key.length), cell(r.cases[key].ms, "{:.3f}")])
    return ["way", "tokens", "forward and backward, ms"], rows


def memory_table(r):
    rows = []
    for experts, length, tkd in r.keys():
        if tkd != PAPER:
            continue
        cases = [("sida", r.sida(experts, length, tkd))]
        cases += [(f"PyTorch {way}", case) for way, case in r.torch(experts, length, tkd).items()]
        for name, case in cases:
            own = "device_bytes_peak" if name == "sida" else "torch_bytes_peak"
            counts = [own, "driver_bytes_peak", "driver_bytes_before"]
            rows.append([str(experts), str(length), name, *(mib(case, c) for c in counts)])
    head = ["E", "tokens", "", "own count, MiB", "the driver's, MiB", "of it before, MiB"]
    return head, rows


def share_table(r):
    rows = []
    for experts, length in sorted(r.timelines):
        line, shares = r.timeline(experts, length), r.shares(experts, length)
        idles = [f"{idle(each):.1%}" for each in r.timelines[experts, length]]
        row = [str(experts), str(length), cell(line["window_ms"] / line["steps"], "{:.3f}")]
        row += [cell(shares[name], "{:.1%}") for name in [*CLASSES, "idle"]]
        count = sum(kernel["count"] for kernel in line["kernels"])
        rows.append([*row, ", ".join(idles), cell(count / line["steps"], "{:.0f}")])
    head = ["E", "tokens", "a step, ms", *CLASSES, "idle, median", "all", "kernels and copies a step"]
    return head, rows


def trace_table(r):
    names = [("trace", "`sida trace`"), ("dry-run", "the forward alone")]
    names += [("hooks", "Transformers with hooks")]
    rows = []
    for system, name in names:
        row = r.single.get(system)
        if not row:
            continue
        rate, merge = row["tokens_per_s"], row.get("merge_s", 0)
        tokens = row.get("new_tokens", 0) or sum(row.get("tokens", []))
        line = [name, f"{tokens:,}", cell(rate, "{:,.0f}")]
        line += [cell(tokens / (tokens / rate + merge) if merge else None, "{:,.0f}")]
        line += [cell(row.get("bytes_per_token") or None, "{:.0f}")]
        rows.append([*line, cell(row["wall_seconds"], "{:.1f}"), str(row["runs"])])
    head = ["", "tokens", "tokens/s", "with the merge", "bytes a token", "whole process, s", "runs"]
    return head, rows


def whole_table(r):
    rows = []
    for system, name in (("train", "`sida train`"), ("torch-train", "PyTorch, TF32")):
        row = r.single.get(system)
        if not row:
            continue
        hit = row["valid"]["overall"]["hit@1"] if system == "train" else max(row["valid_hit@1"])
        line = [name, str(row["epochs"]), str(row["steps"]), cell(row["seconds"], "{:.1f}")]
        line += [cell(row["tokens_per_s"], "{:,.0f}"), cell(row["wall_seconds"], "{:.1f}")]
        rows.append([*line, cell(hit, "{:.1f}")])
    head = ["", "epochs", "steps", "training, s", "tokens/s", "whole process, s", "best hit@1, %"]
    return head, rows


def print_train_report(r):
    machine = r.file["machine"]
    driver = machine.get("nvidia_smi", {}).get("driver_version", "unknown")
    versions = ", ".join(f"{k} {v}" for k, v in r.versions.items())
    print(f"{machine['device']}, driver {driver}; {versions}")
    for part, record in r.file["parts"].items():
        print(f"- {part}: {record['date']}, commit {record['commit']}")
    print("\n## What must be shown\n")
    print(markdown(["", "goal", "at least / at most", "measured", "met"], goals(r)))
    print_sections(
        [
            ("Steps of training", step_table(r)),
            ("The LSTM alone", lstm_table(r)),
            ("Memory at its peak", memory_table(r)),
            ("What the device does in a step", share_table(r)),
            ("Tracing", trace_table(r)),
            ("From a trace to a predictor", whole_table(r)),
        ]
    )
    print_failures(r.failures)
