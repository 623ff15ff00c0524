"""How tools/bench/predictors runs commands: --jobs at a time on the CPU, and beside them, where
there are --gpus, trainings on these, --per-gpu at a time on each."""

import concurrent.futures
import json
import os
import queue
import re
import shlex
import sys
import time

from jobs import run_command, save


def curve(err):
    """Validation hit@1 of every epoch, from a training's progress."""
    return [float(x) for x in re.findall(r"^epoch \d+/\d+ .* valid hit@1 ([\d.]+)", err, re.M)]


class Runner:
    """With --resume what the same command printed stays."""

    def __init__(self, args):
        self.args, self.gpus = args, queue.SimpleQueue()
        self.ends = time.monotonic() + args.time_limit if args.time_limit else None
        self.cpu = concurrent.futures.ThreadPoolExecutor(args.jobs)
        for gpu in args.gpus * args.per_gpu:
            self.gpus.put(gpu)
        slots = len(args.gpus) * args.per_gpu
        self.gpu = concurrent.futures.ThreadPoolExecutor(slots) if slots else self.cpu
        self.plans = concurrent.futures.ThreadPoolExecutor(256)  # these only wait for the others
        self.failed = None  # the first failure; what others say after it only follows from it

    def path(self, name):
        return os.path.join(self.args.work, name)

    def kept(self, name, words, makes):
        if not self.args.resume or not all(map(os.path.exists, makes)):
            return None
        if not os.path.exists(self.path(name + ".json")):
            return None
        with open(self.path(name + ".json"), encoding="utf-8") as file:
            record = json.load(file)
        return record if record["command"] == words else None

    def execute(self, name, words, makes, before):
        """The record of a command, with the JSON that it printed."""
        record = self.kept(name, words, makes)
        if record:
            return record
        if self.ends and time.monotonic() > self.ends:
            raise RuntimeError(f"{name}: not started: --time-limit; --resume goes on from here")
        begin = time.monotonic()
        status, out, err = run_command([*before, *words], self.args.timeout)
        if status != 0:
            last = (err.strip().splitlines() or ["nothing on stderr"])[-1]
            raise RuntimeError(f"{shlex.join(words)}: exit status {status}: {last}")
        record = {"command": words, "output": json.loads(out), "curve": curve(err)}
        record["seconds"] = round(time.monotonic() - begin, 2)
        save(self.path(name + ".json"), record)
        print(f"{record['seconds']:8.1f} s  {name}", file=sys.stderr, flush=True)
        return record

    def turn(self, name, words, makes, gpu):
        visible = self.gpus.get() if gpu else None
        try:
            before = ["env", f"CUDA_VISIBLE_DEVICES={visible}"] if gpu else []
            return self.execute(name, words, makes, before)
        except Exception as error:
            self.failed = self.failed or error
            raise
        finally:
            if gpu:
                self.gpus.put(visible)

    def run(self, name, words, makes=(), gpu=False):
        """Waits for its turn and its end."""
        words = [*words, "--json"]
        if self.args.threads:
            words += ["--threads", str(self.args.threads)]
        gpu = gpu and bool(self.args.gpus)
        pool = self.gpu if gpu else self.cpu
        return pool.submit(self.turn, name, words, makes, gpu).result()

    def map(self, work):
        """[(key, function)] -> {key: result}, all at a time, each waiting in its own run(); the
        first failure ends everything."""
        futures = {key: self.plans.submit(function) for key, function in work}
        try:
            concurrent.futures.wait(futures.values(), return_when="FIRST_EXCEPTION")
            for future in filter(concurrent.futures.Future.done, futures.values()):
                future.result()
            return {key: future.result() for key, future in futures.items()}
        except BaseException as error:
            for pool in (self.plans, self.cpu, self.gpu):
                pool.shutdown(wait=False, cancel_futures=True)
            raise self.failed or error from None
