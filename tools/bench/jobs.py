"""What tools/bench/gpu and gpu-train share: jobs, each a process of its own, run one after another
into one results file, which is written after every job."""

import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))


# --- running


class Job:
    """A command, how to read what it prints, and what the report needs to know of it. lines: it
    prints JSON lines instead of one object. poll: nvidia-smi watches the memory. makes: files that
    later jobs need; without them the job is not skipped on --resume."""

    def __init__(self, system, command, poll=False, lines=False, makes=(), **case):
        self.system, self.command, self.case = system, command, case
        self.poll, self.lines, self.makes = poll, lines, makes


class Poll:
    """The highest memory.used that nvidia-smi shows while a command runs."""

    def __init__(self):
        self.peak_mib = 0
        query = "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0 -lms 100"
        self.process = subprocess.Popen(query.split(), stdout=subprocess.PIPE, text=True)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.peak_mib = max(self.peak_mib, int(line))

    def stop(self):
        self.process.terminate()
        self.thread.join()
        self.process.wait()
        return self.peak_mib << 20


def decode(text, lines):
    """One object; or the lines of a script: a header, rows, and what failed."""
    if not lines:
        return json.loads(text)
    output = {"rows": [], "failed": []}
    for line in (json.loads(line) for line in text.splitlines() if line.startswith("{")):
        kind = line.pop("kind", "header")
        if kind == "header":
            output.update(line)
        else:
            output["rows" if kind == "row" else "failed"].append(line)
    return output


def run_command(command, timeout):
    """(exit status or None after the time limit, stdout, stderr); takes its children along."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def run_job(job, timeout):
    record = {"system": job.system, "case": job.case, "command": shlex.join(job.command)}
    reason, poll = None, None
    begin = time.monotonic()
    try:
        poll = Poll() if job.poll else None
        status, out, err = run_command(job.command, timeout)
        if status is None:
            reason = f"ended after {timeout:.0f} s"
        elif status != 0:
            last = err.strip().splitlines()[-1:] or ["nothing on stderr"]
            reason = f"exit status {status}: {last[0][:500]}"
        if out.strip():  # some rows may be there even so
            record["output"] = decode(out, job.lines)
            for row in record["output"].get("failed", []):
                reason = f"{row['failed'][:500]}"
        elif not reason:
            reason = "printed nothing"
    except (OSError, ValueError) as error:  # no such program, no JSON
        reason = reason or str(error)
    finally:
        if poll:
            record["smi_bytes_peak"] = poll.stop()
    record["seconds"] = round(time.monotonic() - begin, 2)
    record["status"] = "failed" if reason else "ok"
    if reason:
        record["reason"] = reason
    return record


# --- the file


def query(command):
    try:
        got = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return got.stdout.strip() if got.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine(args):
    found = {}
    fields = ["name", "driver_version", "memory.total", "memory.used", "clocks.max.sm"]
    fields += ["pcie.link.gen.max", "pcie.link.width.max"]
    line = query(
        [
            "nvidia-smi",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
            "-i",
            "0",
        ]
    )
    if line:
        found["nvidia_smi"] = dict(zip(fields, (x.strip() for x in line.split(","))))
    try:
        found["doctor"] = json.loads(
            query([args.sida, "doctor", "--json", "--device", args.device])
        )
    except ValueError:
        pass
    found["device"] = found.get("nvidia_smi", {}).get("name", args.device)
    found["logical_cpus"] = os.cpu_count()
    return found


def commit(args):
    if args.commit:
        return args.commit
    head = query(["git", "-C", HERE, "rev-parse", "HEAD"])
    tree = ["--untracked-files=no", "--", ":(top)", ":(top,exclude)tools/bench/results"]
    changed = query(["git", "-C", HERE, "status", "--porcelain", *tree])
    return head + ("-dirty" if changed else "") or "unknown"


def load(program, path, form, device):
    if not os.path.exists(path):
        return {"format": form, "parts": {}}
    with open(path, encoding="utf-8") as file:
        results = json.load(file)
    if results.get("format") != form:
        raise SystemExit(f"{program}: {path}: not a file of this program ({form})")
    if results["machine"]["device"] != device:
        raise SystemExit(
            f"{program}: {path}: measured on {results['machine']['device']}, this is {device}; "
            "name another --output"
        )
    return results


def save(path, results):
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[\s+([-+.eE\d,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(path + ".tmp", path)


def run_part(args, part, results, ends, plan):
    """Runs the jobs of plan(args, part, results); returns the number of those that failed."""
    before = results["parts"].get(part, {})
    done = {}
    if args.resume and before.get("commit") == args.commit:
        for job in before["jobs"]:
            if job["status"] == "ok":
                done.setdefault(job["command"], []).append(job)
    record = {
        "commit": args.commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "jobs": [],
    }
    results["parts"][part] = record
    try:
        jobs = plan(args, part, results)
    except LookupError as error:
        record["jobs"] = [{"system": part, "case": {}, "status": "failed", "reason": str(error)}]
        jobs = []
    finished = []
    for job in jobs:
        kept = all(map(os.path.exists, job.makes)) and done.get(shlex.join(job.command))
        left, note = ends - time.monotonic(), "ok"
        if kept:
            got, note = kept.pop(0), "kept"
        elif left < 10:
            got = {"system": job.system, "case": job.case, "command": shlex.join(job.command)}
            got |= {"status": "failed", "reason": "not started: --time-limit"}
        else:
            got = run_job(job, min(args.timeout, left))
        finished.append(got)  # what is to be kept stays in the file until its turn comes
        record["jobs"] = finished + [job for jobs_kept in done.values() for job in jobs_kept]
        save(args.output, results)
        note = got.get("reason", note)
        print(f"{part:10} {got.get('seconds', 0):7.1f} s  {got['command']}: {note}", flush=True)
    record["jobs"] = finished or record["jobs"]
    save(args.output, results)
    failed = [job for job in record["jobs"] if job["status"] != "ok"]
    if failed and not jobs:
        print(f"{part:10} {failed[0]['reason']}", flush=True)
    return len(failed)
