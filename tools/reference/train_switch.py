#!/usr/bin/env python3
"""Trains the small Switch Transformer that is bundled as a sample.

Phase 1 is T5 span corruption over contiguous prose. Phase 2 mixes SST-2, MRPC and MultiRC, cast as
text to text, with the same spans at a third of the learning rate and with the routers frozen. An
exponential average of phase 2's weights is scored every --eval-every steps on SST-2 training
sentences that were set aside, and the best of them is what is saved, as a Hugging Face directory:
config.json, model.safetensors (bf16), spiece.model, training.json, training.log.

Routing follows Fedus et al. 2022: top-1, alpha is the softmax probability, load-balancing and z
losses, and a capacity over the whole batch while training. In evaluation the capacity is counted a
sequence at a time, as Hugging Face Transformers 4.57 does it. Adam's step is scaled by the RMS of
each tensor, as in Adafactor; without that T5's initialisation does not train.

Several phases 2 can start from one phase 1 (--save-spans, --from-spans); since they share its
routers, --average saves and scores the mean of their weights.

Data under --data:  sst2/{train,dev}.tsv.gz  mrpc/msr_paraphrase_{train,test}.txt.gz
multirc/{train,val}.jsonl.gz  corpus/*.txt.gz (a paragraph a line)  t5_tokenizer/spiece.model
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from switch_data import (
    HELD_OUT,
    MIX,
    SPAN_SOURCE,
    Batches,
    Task,
    corrupt,
    pad,
    read_corpus,
    read_tasks,
    set_sentences_aside,
)
from switch_model import EOS, PAD, PRESETS, Routing, SparseFF, Switch, load_tensors, save


# ------------------------------------------------------------------ training
class ScaledAdam:
    """Adam whose step is multiplied by the RMS of the tensor it changes, with the gradient's norm
    clipped at 1. A step with a non-finite gradient only lets the moments decay. All of its state is
    on the device and nothing here waits for the device, so that a CUDA graph can hold a step."""

    beta1, beta2, eps = 0.9, 0.98, 1e-8

    def __init__(self, params: list[nn.Parameter], average: list[Tensor] | None):
        self.params, self.average = params, average
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        device = params[0].device
        self.lr, self.steps, self.skipped = (torch.zeros((), device=device) for _ in range(3))
        self.root_size = torch.tensor([p.numel() ** 0.5 for p in params], device=device)

    @torch.no_grad()
    def step(self, grads: list[Tensor], decay: float = 0.998) -> None:
        norm = torch.stack(torch._foreach_norm(grads)).square().sum().sqrt()
        finite = torch.isfinite(norm)
        clip = torch.where(finite, (1 / (norm + 1e-6)).clamp(max=1), 0)
        grads = [g.nan_to_num(0, 0, 0) for g in grads]
        torch._foreach_mul_(grads, clip)
        torch._foreach_lerp_(self.m, grads, 1 - self.beta1)
        torch._foreach_mul_(self.v, self.beta2)
        torch._foreach_addcmul_(self.v, grads, grads, 1 - self.beta2)
        self.steps += 1
        self.skipped += ~finite
        rms = (torch.stack(torch._foreach_norm(self.params)) / self.root_size).clamp(min=1e-3)
        rate = finite * self.lr * rms / (1 - self.beta1**self.steps)
        root = torch._foreach_sqrt(self.v)
        torch._foreach_div_(root, (1 - self.beta2**self.steps).sqrt())
        torch._foreach_add_(root, self.eps)
        update = torch._foreach_div(self.m, root)
        torch._foreach_mul_(update, list(rate.unbind()))
        torch._foreach_sub_(self.params, update)
        if self.average is not None:
            torch._foreach_lerp_(self.average, self.params, 1 - decay)


class Trainer:
    """Runs training steps. With `graphs`, the whole step (forward, backward, update) is captured
    once for every batch shape and replayed: the model is so small that launches would dominate."""

    def __init__(
        self, model: Switch, balance: tuple[str, ...], average: list[Tensor] | None, graphs: bool
    ):
        self.model, self.balance, self.graphs = model, balance, graphs
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.opt = ScaledAdam(self.params, average)
        self.device = self.params[0].device
        self.shapes: dict[str, dict] = {}

    def work(self, kind: str, src: Tensor, tgt: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss, router_loss = self.model(src, tgt)
        total = loss + router_loss if kind in self.balance else loss
        self.opt.step(list(torch.autograd.grad(total, self.params)))
        return loss.detach()

    def __call__(self, kind: str, src: Tensor, tgt: Tensor, lr: float) -> Tensor:
        self.opt.lr.fill_(lr)
        s = self.shapes.setdefault(
            kind, {"seen": 0, "src": src.to(self.device), "tgt": tgt.to(self.device)}
        )
        s["src"].copy_(src, non_blocking=True)
        s["tgt"].copy_(tgt, non_blocking=True)
        if not self.graphs:
            return self.work(kind, s["src"], s["tgt"])
        if s["seen"] < 3:  # a graph needs warmed-up libraries
            s["seen"] += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = self.work(kind, s["src"], s["tgt"])
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if "graph" not in s:
            s["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(s["graph"]):
                s["loss"] = self.work(kind, s["src"], s["tgt"])
        s["graph"].replay()
        return s["loss"]


# ------------------------------------------------------------------ evaluation
@torch.no_grad()
def label_scores(
    model: Switch, spm, sources: list[str], labels: list[str], batch: int = 128
) -> Tensor:
    """[N, labels]: log-probability of the whole label, every piece and </s>."""
    device = model.shared.weight.device
    ids = [row[:511] + [EOS] for row in spm.encode(sources)]
    targets = [torch.tensor(spm.encode(label) + [EOS], device=device) for label in labels]
    order, out = (
        sorted(range(len(ids)), key=lambda i: len(ids[i])),
        torch.zeros(len(ids), len(labels)),
    )
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        src, routing = pad([ids[i] for i in part]).to(device), Routing()
        memory = model.encode(src, routing)
        for j, t in enumerate(targets):
            t = t.expand(len(part), -1)
            logp = model.decode(src, memory, t, routing).log_softmax(-1)
            out[part, j] = logp.gather(-1, t[..., None]).sum((1, 2)).cpu()
    return out


def score(model: Switch, spm, rows: list[tuple[str, str]], task: Task) -> dict[str, float]:
    choice = (
        label_scores(model, spm, [source for source, _ in rows], task.labels).argmax(-1).tolist()
    )
    pairs = [(task.labels[c], gold) for c, (_, gold) in zip(choice, rows)]
    hit = sum(p == g == task.positive for p, g in pairs)
    named = sum((p == task.positive) + (g == task.positive) for p, g in pairs)
    return {
        "accuracy": 100 * sum(p == g for p, g in pairs) / len(pairs),
        "f1": 200 * hit / max(1, named),
    }


@torch.no_grad()
def routing_statistics(model: Switch, tokens: np.ndarray, batch: int = 64) -> dict[str, dict]:
    """Per MoE layer: expert shares, mean alpha, share of dropped tokens. The encoder reads the text
    as it is, in rows of 256; the decoder writes the spans cut out of it. </s> does not count."""
    names, device, rng = list(model.sparse()), model.shared.weight.device, np.random.default_rng(0)
    experts, total = model.config["num_experts"], {}
    rows = [
        tokens[i : i + SPAN_SOURCE - 1]
        for i in range(0, len(tokens) - SPAN_SOURCE, SPAN_SOURCE - 1)
    ]
    for at in range(0, len(rows), batch):
        src, tgt = zip(*(corrupt(row, rng) for row in rows[at : at + batch]))
        plain = pad([np.append(row, EOS) for row in rows[at : at + batch]]).to(device)
        src, tgt = pad(src).to(device), pad(tgt).to(device)
        enc, dec = Routing(keep=True), Routing(keep=True)
        model.encode(plain, enc)
        model.decode(src, model.encode(src, Routing()), tgt, dec)
        inp = F.pad(tgt, (1, 0))[:, :-1]
        counted = [plain > EOS] * len(enc.layers) + [(inp > EOS) & (tgt != PAD)] * len(dec.layers)
        for name, (expert, alpha, used), m in zip(names, enc.layers + dec.layers, counted):
            t = total.setdefault(name, torch.zeros(experts + 3, dtype=torch.float64, device=device))
            t[:experts] += torch.bincount(expert[m], minlength=experts)
            t[experts:] += torch.stack([m.sum(), alpha[m].sum(), (m & ~used).sum()])
    out = {}
    for name, t in total.items():
        share, (n, alpha, dropped) = (
            (t[:experts] / t[:experts].sum()).tolist(),
            t[experts:].tolist(),
        )
        out[name] = {
            "tokens": int(n),
            "min_share_times_experts": min(share) * experts,
            "idle": sum(s * experts < 0.1 for s in share),
            "max_share": max(share),
            "mean_alpha": alpha / n,
            "dropped": dropped / n,
            "shares": share,
        }
    return out


# ------------------------------------------------------------------ the run
def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


class Run:
    """One training run: the data, the model, its log and its report."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.began, self.device = a, time.time(), torch.device(a.device)
        a.out.mkdir(parents=True, exist_ok=True)
        self.log_file = open(a.out / "training.log", "w", encoding="utf-8")
        torch.manual_seed(a.seed)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it knows no gradient of the bias
        shutil.copyfile(a.data / "t5_tokenizer/spiece.model", a.out / "spiece.model")
        self.spm = sentencepiece.SentencePieceProcessor(model_file=str(a.out / "spiece.model"))
        self.tasks = read_tasks(a.data)
        sst2 = self.tasks["sst2"]
        sst2.train, self.aside, whole = set_sentences_aside(sst2.train, a.aside, a.seed)
        self.tokens, self.held_out = read_corpus(a.data, a.hold_out, self.spm)
        self.encoded = {
            k: list(
                zip(
                    self.spm.encode([s for s, _ in t.train], num_threads=16),
                    self.spm.encode([y for _, y in t.train], add_eos=True),
                )
            )
            for k, t in self.tasks.items()
        }
        SparseFF.idle_weight = a.idle_weight
        with torch.device(self.device):
            self.model = Switch(PRESETS[a.preset])
        options = {
            k: v for k, v in vars(a).items() if not isinstance(v, (Path, list)) and v is not None
        }
        self.report = {
            "options": options,
            "config": PRESETS[a.preset],
            "torch": str(torch.__version__),
            "weights": sum(p.numel() for p in self.model.parameters()),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "data": {
                "corpus_tokens": len(self.tokens),
                "held_out_tokens": {k: len(v) for k, v in self.held_out.items()},
                "train_rows": {k: len(t.train) for k, t in self.tasks.items()},
                "sst2_set_aside": {"rows": len(self.aside), "whole_sentences": whole},
            },
            "seconds": {},
            "loss": [],
            "selection": [],
        }
        self.log(f"torch {torch.__version__} on {self.report['device']}; {options}")
        self.log(f"{self.report['weights']} weights; data {self.report['data']}")

    def log(self, text: str) -> None:
        line = f"[{time.time() - self.began:6.1f} s] {text}"
        print(line, flush=True)
        print(line, file=self.log_file, flush=True)

    def phase(
        self, name: str, steps: int, peak: float, kinds, trainer: Trainer, every: int, at_eval
    ) -> None:
        """`steps` steps with 300 of warm-up, then a cosine down to 2 % of `peak`."""
        a, begin, sums = self.a, time.time(), {}
        lengths = {k: t.length for k, t in self.tasks.items()}
        size, words = (
            (a.batch_tokens, 0.0) if name == "spans" else (a.task_batch_tokens, a.word_dropout)
        )
        batches = Batches(kinds, self.tokens, self.encoded, lengths, size, words, a.seed)
        loader = iter(
            DataLoader(
                batches,
                batch_size=None,
                num_workers=a.workers,
                pin_memory=trainer.graphs,
                prefetch_factor=8 if a.workers else None,
            )
        )
        self.model.train()
        for step in range(1, steps + 1):
            kind, src, tgt = next(loader)
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            loss = trainer(kind, src, tgt, peak * min(1, step / 300) * cosine)
            s = sums.setdefault(kind, [torch.zeros_like(loss), 0])
            s[0], s[1] = s[0] + loss, s[1] + 1
            if step % every == 0 or step == steps:
                mean = {k: (total / n).item() for k, (total, n) in sums.items()}
                sums.clear()
                self.report["loss"].append({"phase": name, "step": step, **mean})
                shown = " ".join(f"{k} {v:.3f}" for k, v in mean.items())
                self.log(
                    f"{name} {step}/{steps} loss {shown}; {(time.time() - begin) / step * 1e3:.1f} "
                    f"ms a step, {int(trainer.opt.skipped)} skipped"
                )
                self.model.eval()
                at_eval(step)
                self.model.train()
        self.model.eval()
        self.report["seconds"][name] = time.time() - begin

    def statistics(self) -> dict:
        both = {**self.held_out, "all": np.concatenate(list(self.held_out.values()))}
        stats = {part: routing_statistics(self.model, tokens) for part, tokens in both.items()}
        for part, layers in stats.items():
            for name, s in layers.items():
                s.pop("shares")
                self.log(
                    f"routing, {part}, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in s.items())
                )
        return stats

    def glance(self) -> None:
        """Logs how evenly some of the training text is routed."""
        rng = np.random.default_rng(self.a.seed)
        starts = rng.integers(0, len(self.tokens) - SPAN_SOURCE, 200)
        sample = np.concatenate([self.tokens[i : i + SPAN_SOURCE - 1] for i in starts])
        stats = routing_statistics(self.model, sample).values()
        lows = " ".join(f"{s['min_share_times_experts']:.2f}" for s in stats)
        alphas = " ".join(f"{s['mean_alpha']:.2f}" for s in stats)
        self.log(f"  training text: lowest share x E {lows}, alpha {alphas}")

    def spans(self) -> None:
        a, trainer = self.a, Trainer(self.model, ("spans",), None, self.a.graphs)

        def at_eval(step: int) -> None:
            if step % 500 == 0:
                self.glance()

        self.phase("spans", a.span_steps, a.lr, ("spans",), trainer, 250, at_eval)
        self.report["routing_after_spans"] = self.statistics()
        if a.save_spans:
            torch.save({"weights": self.model.state_dict(), "report": self.report}, a.save_spans)

    def mixed(self) -> None:
        a, sst2 = self.a, self.tasks["sst2"]
        self.model.set_dropout(a.task_dropout, a.expert_dropout, a.edge_dropout)
        for layer in self.model.sparse().values():
            layer.router.requires_grad_(False)
        params = [p for p in self.model.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in params]
        trainer = Trainer(self.model, ("spans",), average, a.graphs)
        best = {"accuracy": -1.0}

        def at_eval(step: int) -> None:
            current = [p.detach().clone() for p in params]
            self.assign(params, average)
            result = {"step": step, **score(self.model, self.spm, self.aside, sst2)}
            self.report["selection"].append(result)
            if step % 500 == 0:
                self.glance()
            better = result["accuracy"] >= best["accuracy"]
            self.log(
                f"  sentences set aside: {result['accuracy']:.2f} %{', kept' if better else ''}"
            )
            if better:
                best.update(result, weights=[p.to(torch.bfloat16) for p in average])
                self.report["selected"] = result
                save(self.model, a.out, rounded(self.report))
            self.assign(params, current)

        self.phase("mixed", a.task_steps, a.lr / 3, MIX, trainer, a.eval_every, at_eval)
        self.assign(params, best["weights"])

    def average(self, paths: list[Path]) -> None:
        """Takes the mean of models that were tuned from one phase 1 and share its routers."""
        states = [load_tensors(self.model, path) for path in paths]
        mean = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
        self.model.load_state_dict(mean)
        self.model.eval()
        self.report["options"] = {"average": [path.name for path in paths], "seed": self.a.seed}
        self.report["average_of"] = [json.loads((p / "training.json").read_text()) for p in paths]
        result = score(self.model, self.spm, self.aside, self.tasks["sst2"])
        self.report["selected"] = result
        self.log(f"mean of {len(paths)} models; sentences set aside: {result['accuracy']:.2f} %")

    @staticmethod
    @torch.no_grad()
    def assign(params: list[Tensor], values: list[Tensor]) -> None:
        for p, v in zip(params, values):
            p.copy_(v)

    def finish(self) -> None:
        """Scores the weights as they are saved: rounded to bf16, computed in fp32."""
        for p in self.model.parameters():
            p.data = p.data.to(torch.bfloat16).float()
        self.model.eval()
        self.report["scores"] = {
            name: {
                **score(self.model, self.spm, t.test, t),
                "rows": len(t.test),
                "constant": t.constant(),
            }
            for name, t in self.tasks.items()
        }
        for name, s in self.report["scores"].items():
            self.log(
                f"{name}: accuracy {s['accuracy']:.2f} F1 {s['f1']:.2f}; constant answer "
                f"{s['constant']['accuracy']:.2f} {s['constant']['f1']:.2f}; {s['rows']} rows"
            )
        self.report["routing"] = self.statistics()
        self.report["seconds"]["all"] = time.time() - self.began
        save(self.model, self.a.out, rounded(self.report))
        self.log(f"saved {self.a.out.name}")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--preset", choices=PRESETS, default="sample")
    p.add_argument("--span-steps", type=int, default=6000)
    p.add_argument("--task-steps", type=int, default=3000)
    p.add_argument("--batch-tokens", type=int, default=32768, help="source positions in a batch")
    p.add_argument("--lr", type=float, default=1e-2, help="peak of phase 1; phase 2 has a third")
    p.add_argument(
        "--idle-weight", type=float, default=0.1, help="of the loss against idle experts"
    )
    p.add_argument("--task-batch-tokens", type=int, default=16384, help="the same in phase 2")
    p.add_argument("--word-dropout", type=float, default=0.1, help="of the tasks' source tokens")
    p.add_argument("--task-dropout", type=float, default=0.1, help="in phase 2, outside experts")
    p.add_argument("--expert-dropout", type=float, default=0.4, help="in phase 2, inside experts")
    p.add_argument("--edge-dropout", type=float, default=0.1, help="in phase 2, at a stack's ends")
    p.add_argument(
        "--aside", type=float, default=0.05, help="share of SST-2 sentences to select on"
    )
    p.add_argument("--eval-every", type=int, default=250)
    p.add_argument(
        "--hold-out",
        default=HELD_OUT,
        metavar="FILE:START:END",
        help="corpus lines never trained on: in the file whose name begins so, from the "
        "first line that matches START up to the one that matches END",
    )
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--workers", type=int, default=12)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="CUDA graphs (the default on a CUDA device)",
    )
    p.add_argument("--save-spans", type=Path, help="write the state after phase 1")
    p.add_argument("--from-spans", type=Path, help="start from such a state, skipping phase 1")
    p.add_argument(
        "--average",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="train nothing: save and score the mean of these, tuned from one phase 1",
    )
    a = p.parse_args()
    a.graphs = a.device.startswith("cuda") if a.graphs is None else a.graphs
    run = Run(a)
    if a.average:
        run.average(a.average)
        run.finish()
        return
    if a.from_spans:
        state = torch.load(a.from_spans, map_location=run.device)
        run.model.load_state_dict(state["weights"])
        for key in ("seconds", "loss", "routing_after_spans"):
            run.report[key] = state["report"][key]
        run.report["span_options"] = state["report"]["options"]
    else:
        run.spans()
    run.mixed()
    run.finish()


if __name__ == "__main__":
    main()
