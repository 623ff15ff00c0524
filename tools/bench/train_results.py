"""Reads a results file of tools/bench/gpu-train for tools/bench/report: samples by case, checked,
and the figures that are made of them."""

import collections
import statistics

from gpu_results import Case, Refused, check_row, near

FORMAT = "sida-bench-train 1"

Key = collections.namedtuple("Key", "system experts length tkd")

CLASSES = ["cuDNN", "products", "own", "copies", "other"]
PRODUCTS = ("gemm", "gemv", "cublas", "cutlass", "xmma", "nvjet", "splitk")
CUDNN = ("cudnn", "rnn", "lstm", "persist")


def key_of(job, row):
    """Steps of ours and of PyTorch's ways; of the LSTM alone, where experts are 0."""
    if job["system"] == "sida":
        system = "sida" if row["tf32"] else "sida-fp32"
        return Key(system, row["experts"], row["length"], row["tkd"])
    system = row["mode"] if row["experts"] == 0 else "torch-" + row["mode"]
    return Key(system, row["experts"], row["length"], row.get("tkd"))


def check_end(row, where):
    """The blocks lie within the time that `with_finish_ms` is the mean of, and 4 steps more."""
    steps = len(row["samples_ms"]) * row["block"]
    if sum(row["samples_ms"]) * row["block"] > row["with_finish_ms"] * (steps + 4) * 1.001:
        claim = row["with_finish_ms"]
        raise Refused(f"{where}: with_finish_ms is {claim}, the samples take longer")


def idle(line):
    return 1 - line["busy_ms"] / line["window_ms"]


def check_timeline(line, where):
    if not 0 < line["busy_ms"] <= line["window_ms"] * (1 + 1e-9):
        raise Refused(f"{where}: busy for {line['busy_ms']} of {line['window_ms']} ms")
    if sum(kernel["ms"] for kernel in line["kernels"]) < line["busy_ms"] * (1 - 1e-6):
        raise Refused(f"{where}: its kernels took less than the time that the device was busy")


def check_hooks(row, where):
    samples, tokens = row["samples_ms"], row["tokens"]
    if not samples or len(samples) != len(tokens) or min(samples) <= 0:
        raise Refused(f"{where}: no samples, or some that are no times")
    if not near(row["tokens_per_s"], sum(tokens) / sum(samples) * 1e3):
        raise Refused(f"{where}: tokens_per_s is {row['tokens_per_s']}, its samples say otherwise")


def middle(rows):
    """One row for the runs of a program: medians of what differs from run to run."""
    row = rows[0] | {"runs": len(rows)}
    for name in ("tokens_per_s", "merge_s", "seconds", "wall_seconds"):
        if name in row:
            row[name] = statistics.median(each[name] for each in rows)
    return row


class TrainResults:
    def __init__(self, file):
        self.file = file
        self.cases, self.timelines, self.single, self.runs = {}, {}, {}, {}
        self.failures, self.devices, self.versions = [], set(), {}
        for part, record in file["parts"].items():
            for job in record["jobs"]:
                self.add_job(part, job)
        if len(self.devices) > 1:
            raise Refused(f"measured on different devices: {', '.join(sorted(self.devices))}")
        self.own = file["own_kernels"].split() if self.timelines else []
        self.check_whole()

    def add_job(self, part, job):
        where = f"{part}: {job.get('command', job['system'])}"
        if job["status"] != "ok":
            self.failures.append((where, job["reason"]))
        output = job.get("output")
        if not output:
            return
        if output.get("device") not in (None, "cpu", "cuda"):  # not all name the device
            self.devices.add(output["device"])
        self.versions.update(output.get("versions", {}))
        if job["system"] in ("sida", "torch", "lstm"):
            for row in output.get("rows", [output]):
                self.add_steps(job, row, output, where)
        elif job["system"] == "timeline":
            check_timeline(output["timeline"], where)
            lines = self.timelines.setdefault((output["experts"], output["length"]), [])
            lines.append(output["timeline"])
            lines.sort(key=idle)
        elif job["status"] == "ok":
            row = output["rows"][0] if "rows" in output else output
            if job["system"] == "hooks":
                check_hooks(row, where)
            runs = self.runs.setdefault(job["system"], [])
            runs.append(row | {"wall_seconds": job["seconds"]})
            self.single[job["system"]] = middle(runs)

    def add_steps(self, job, row, output, where):
        check_row(row, output, where)
        if "with_finish_ms" in row:
            check_end(row, where)
        case = self.cases.setdefault(key_of(job, row), Case(row, output))
        case.samples += row["samples_ms"]

    def check_whole(self):
        ours, theirs = self.single.get("train"), self.single.get("torch-train")
        if ours and theirs and ours["steps"] != theirs["steps"]:
            raise Refused(f"whole: {ours['steps']} steps beside {theirs['steps']}")

    # --- figures: None where something was not measured

    def sida(self, experts, length, tkd, system="sida"):
        return self.cases.get(Key(system, experts, length, tkd))

    def torch(self, experts, length, tkd):
        """PyTorch's cases by way."""
        return {
            key.system.removeprefix("torch-"): case
            for key, case in self.cases.items()
            if key.system.startswith("torch-") and key[1:] == (experts, length, tkd)
        }

    def best_torch(self, experts, length, tkd):
        return min(self.torch(experts, length, tkd).values(), key=lambda c: c.ms, default=None)

    def lstm(self, length, own=False):
        """(way, case) of the fastest LSTM alone on cuDNN, whoever ran it; or our own kernels'."""
        ways = [
            (key.system.removeprefix("lstm-"), case)
            for key, case in self.cases.items()
            if key.experts == 0 and key.length == length and ("cluster" in key.system) == own
        ]
        return min(ways, key=lambda way: way[1].ms, default=(None, None))

    def memory_share(self, experts, length, tkd, ours, theirs):
        """Our peak over PyTorch's lowest of its ways."""
        case = self.sida(experts, length, tkd)
        peaks = [c.row.get(theirs) for c in self.torch(experts, length, tkd).values()]
        if not case or not peaks or not all(peaks):
            return None
        return case.row[ours] / min(peaks)

    def timeline(self, experts, length):
        """Of several, the one with the median of idle."""
        lines = self.timelines.get((experts, length))
        return lines and lines[len(lines) // 2]

    def shares(self, experts, length):
        """Shares of the window by class, and idle; classes may run beside each other."""
        line = self.timeline(experts, length)
        if not line:
            return None
        shares = dict.fromkeys(CLASSES, 0)
        for kernel in line["kernels"]:
            shares[classify(kernel["name"], self.own)] += kernel["ms"] / line["window_ms"]
        return shares | {"idle": idle(line)}

    def rate(self, system):
        return self.single.get(system, {}).get("tokens_per_s")

    def trace_ratio(self, other):
        ours, theirs = self.rate("trace"), self.rate(other)
        return ours / theirs if ours and theirs else None

    def keys(self, system="sida"):
        """(experts, length, tkd), the default loss last."""
        found = {key[1:] for key in self.cases if key.system == system}
        return sorted(found, key=lambda key: (key[2] != "l1-renorm", *key))


def classify(name, own):
    """By a kernel's mangled name. Products that cuDNN calls are products."""
    low = name.lower()
    if name.startswith(("copy", "memset")):
        return "copies"
    if any(f"{len(kernel)}{kernel}" in name for kernel in own):
        return "own"
    if any(word in low for word in PRODUCTS):
        return "products"
    if any(word in low for word in CUDNN):
        return "cuDNN"
    return "other"
