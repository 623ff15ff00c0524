"""Reads a results file of tools/bench/gpu for tools/bench/report: samples by case, checked, and the
figures that are made of them."""

import collections
import json
import statistics

FORMAT = "sida-bench-gpu 1"
DTYPES = {"bfloat16": "bf16", "float32": "f32"}


Key = collections.namedtuple("Key", "system experts dtype batch budget prefetch length")


class Refused(Exception):
    pass


# --- reading


class Case:
    """One system, model and length: the samples of all its runs, and what was printed beside them
    (`row` and `whole` are the first run's)."""

    def __init__(self, row, whole):
        self.row, self.whole, self.samples = row, whole, []

    @property
    def ms(self):
        return statistics.median(self.samples)

    @property
    def tokens_per_s(self):
        return self.row["batch"] * self.row["length"] / self.ms * 1e3


def near(a, b, tolerance=1e-6):
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def check_row(row, whole, where):
    """What the program said against what its samples say."""
    samples = row.get("samples_ms")
    if not samples or not all(isinstance(x, (int, float)) and x > 0 for x in samples):
        raise Refused(f"{where}: no samples, or some that are no times")
    median = statistics.median(samples)
    tokens = row["batch"] * row["length"]
    claims = {"latency_ms": median, "tokens_per_s": tokens / median * 1e3}
    if "floor_ms" in row:
        claims["floor_ms"] = row["weight_bytes"] / whole["memory_bytes_per_s"] * 1e3
        claims["share_of_floor"] = claims["floor_ms"] / median
    if "belady_bytes" in row:
        link, belady = whole["link_bytes_per_s"], row["belady_bytes"] / len(samples)
        claims["mean_ms"] = statistics.mean(samples)
        claims["belady_ms"] = belady / link * 1e3
        claims["loading_share_of_link"] = row["loading_bytes_per_s"] / link
    for name, value in claims.items():
        if name in row and not near(row[name], value):
            raise Refused(f"{where}: {name} is {row[name]}, its samples say {value}")


def key_of(job, row):
    case, system = job["case"], job["system"]
    batch, length = row["batch"], row["length"]
    if system.startswith("predictor"):
        return Key(system + row.get("way", ""), row["experts"], None, batch, None, None, length)
    dtype = DTYPES.get(row.get("dtype"), case.get("dtype"))
    if system == "sida":
        budget, prefetch = case["budget"], case.get("prefetch")
        return Key(system, case["experts"], dtype, batch, budget, prefetch, length)
    return Key(system, row["experts"], dtype, batch, "100%", None, length)


def load_results(path, formats):
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    if not isinstance(results, dict) or results.get("format") not in formats:
        raise Refused(f"not a results file of tools/bench/gpu or gpu-train ({', '.join(formats)})")
    return results


class Results:
    def __init__(self, file):
        self.file = file
        self.cases, self.failures, self.outside, self.devices = {}, [], {}, set()
        links = []
        for part, record in self.file["parts"].items():
            for job in record["jobs"]:
                self.add_job(part, job)
                links.append((job.get("output") or {}).get("link_bytes_per_s"))
        # Of all programs: each measures the link once, and once in a while something is in the way.
        links = [link for link in links if link]
        for case in self.cases.values():
            case.link = statistics.median(links) if links else None
        if len(self.devices) > 1:
            raise Refused(f"measured on different devices: {', '.join(sorted(self.devices))}")

    def add_job(self, part, job):
        where = f"{part}: {job.get('command', job['system'])}"
        if job["status"] != "ok":
            self.failures.append((where, job["reason"]))
        output = job.get("output")
        if not output:
            return
        device = output.get("device_name") or output.get("device")
        if device not in (None, "cpu"):  # the scripts do not name a processor
            self.devices.add(device)
        for row in output.get("rows", [output]):
            check_row(row, output, where)
            key = key_of(job, row)
            if part == "memory":  # few runs, while nvidia-smi was watching: no timing
                self.outside[key.system, key.budget] = (job.get("smi_bytes_peak"), row)
                continue
            case = self.cases.setdefault(key, Case(row, output))
            case.samples += row["samples_ms"]

    def sida(self, experts, length, dtype="bf16", batch=1, budget="100%", prefetch=None):
        return self.cases.get(Key("sida", experts, dtype, batch, budget, prefetch, length))

    def standard(self, experts, length, dtype="bf16", batch=1, system="standard"):
        return self.cases.get(Key(system, experts, dtype, batch, "100%", None, length))

    def having(self, place, **fixed):
        """The values of one place of the key, sorted, among sida's cases."""
        fixed = {"system": "sida", **fixed}
        fits = [k for k in self.cases if all(getattr(k, f) == v for f, v in fixed.items())]
        return sorted({getattr(k, place) for k in fits})


# --- figures: each returns None where something was not measured


def times_faster(ours, theirs):
    return theirs.ms / ours.ms if ours and theirs else None


def share_of_floor(case):
    """Bytes that must be read, at the measured memory rate, over the time."""
    if not case:
        return None
    return case.row["weight_bytes"] / case.whole["memory_bytes_per_s"] * 1e3 / case.ms


def over_bound(case, resident):
    """Mean time a batch over the larger of computing alone and moving alone the bytes of Belady's
    schedule: the schedule's bytes are of all batches that count, so the time is too."""
    if not case or not resident or "belady_bytes" not in case.row:
        return None
    moving = case.row["belady_bytes"] / len(case.row["samples_ms"])
    moving_ms = moving / case.link * 1e3
    return statistics.mean(case.samples) / max(resident.ms, moving_ms)


def loading_rate(case):
    if not case or not case.row.get("loading_bytes_per_s"):
        return None
    return case.row["loading_bytes_per_s"] / case.link


def saved(small, full):
    peaks = [case.row.get("driver_bytes_peak") if case else None for case in (small, full)]
    return 1 - peaks[0] / peaks[1] if all(peaks) else None
