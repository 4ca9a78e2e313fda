"""The coupling Gram against training steps and separate backward passes over the same samples.

    python benchmarks/coupling.py [--samples 64,128,256] [--memory-mib 64,1024] [--tied]

A Llama of eight layers (6.8 million parameters, 7.9 untied); samples of 250 prompt and 8 action
tokens. Every arm has a process of its own; they take turns, so that all meet the same machine, in
turned order from repetition to repetition. The table gives medians of seconds (of the processor on
a CPU), their ratio to the training step in micro-batches of 16, and the peak of memory above what
libraries and model take: on a CPU the resident set without cached files (RssAnon of
/proc/self/status, looked at every 20 ms), with CUDA what is allocated. The Grams may keep
`--memory-mib` between passes, each of these in a row of its own; the rest is in a temporary file.
Separate passes are slow and keep all gradients, so they are done once, on `--separate` samples at
most; beyond, seconds and memory are scaled by the number of samples and marked with ~. Their last
product grows with its square, so that is a lower bound. `error` is the largest
|K - K'| / (|g_i| |g_j|) against separate backward passes in float64, on the first `--exact`
samples.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from arms.machine import clock, heading
from transformers import LlamaConfig, LlamaForCausalLM

from untwine.diagnose.coupling import gram, head_gram, off_diagonal_correlation
from untwine.diagnose.samples import StepSample
from untwine.diagnose.scoring import weighted_gradient

VOCABULARY, PROMPT, ACTION, MICROBATCH = 4096, 250, 8, 16
Arm = Callable[[Any, Sequence[StepSample]], Any]


def make_model(tied: bool, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device)


def make_samples(count: int) -> list[StepSample]:
    """Prompts of four kinds that share a head, as prompts of one environment do."""
    g = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (n,), generator=g).tolist()

    heads = [draw(PROMPT // 2) for _ in range(4)]
    return [
        StepSample((*heads[i % 4], *draw(PROMPT - PROMPT // 2)), tuple(draw(ACTION)))
        for i in range(count)
    ]


def training_step(model: Any, samples: Sequence[StepSample]) -> Any:
    return weighted_gradient(model, samples, torch.ones(len(samples)), chunk=MICROBATCH)


def separate_passes(model: Any, samples: Sequence[StepSample]) -> Any:
    """N backward passes, all gradients stored, one product at the end."""
    matrix_NP: Any = None
    for i, sample in enumerate(samples):
        grads = weighted_gradient(model, [sample], torch.ones(1))
        row_P = torch.cat([g.flatten() for g in grads.values()])
        if matrix_NP is None:
            matrix_NP = row_P.new_empty(len(samples), len(row_P))
        matrix_NP[i] = row_P
    return matrix_NP @ matrix_NP.T


STEP, SEPARATE = "training step, micro-batches of 16", "separate passes, gradients stored"


def arms(memory: Sequence[float]) -> dict[str, Arm]:
    def exact(memory_mib: float, recompute: bool) -> Arm:
        return lambda model, samples: gram(
            model,
            samples,
            chunk=MICROBATCH,
            memory_mib=memory_mib,
            recompute=recompute,
            check=False,
        )

    return {
        STEP: training_step,
        **{f"exact Gram, {m:g} MiB": exact(m, False) for m in memory},
        **{f"recompute, {m:g} MiB": exact(m, True) for m in memory[:1]},
        "head only, forward": lambda model, samples: head_gram(
            model, samples, chunk=MICROBATCH, memory_mib=memory[0]
        ),
        SEPARATE: separate_passes,
    }


def work(name: str, tied: bool, device: str, memory: Sequence[float], pipe: Any) -> None:
    """What the process of an arm does: for each number that comes, one measurement."""
    torch.set_num_threads(1)
    model, arm = make_model(tied, device), arms(memory)[name]
    training_step(model, make_samples(2))
    before = resident() if device == "cpu" else torch.cuda.memory_allocated() / 2**20
    while count := pipe.recv():
        samples = make_samples(count)
        if device == "cpu":
            with Peak() as peak:
                start = time.process_time()
                arm(model, samples)
                took = time.process_time() - start
            most = peak.most
        else:
            torch.cuda.reset_peak_memory_stats()
            now = clock(1, device)
            start = now()
            arm(model, samples)
            took, most = now() - start, torch.cuda.max_memory_allocated() / 2**20
        pipe.send((took, max(0.0, most - before)))


def resident() -> float:
    """MiB of this process that are no pages of files, which the kernel can drop at any time. Where
    that is not known, the whole resident set."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return sizes.get("RssAnon", sizes["VmRSS"]) / 1024


class Peak:
    """The most that is resident while it is in force; the kernel keeps no peak without files."""

    def __init__(self) -> None:
        self.most = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, resident())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


class Worker:
    """The process of one arm, from outside."""

    def __init__(
        self, name: str, tied: bool, device: str, memory: Sequence[float], limit: int
    ) -> None:
        """limit: samples at most; 0: no limit."""
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=work, args=(name, tied, device, memory, there))
        self._process.start()
        there.close()  # so that a process that dies ends the wait
        self._limit, self._alive = limit, True

    def measure(self, count: int) -> tuple[float, float]:
        """Seconds, and MiB at the peak; scaled where there are more samples than the limit. NaN
        once the process has died."""
        if not self._alive:
            return math.nan, math.nan
        done = min(count, self._limit or count)
        self._pipe.send(done)
        try:
            took, most = self._pipe.recv()
        except EOFError:  # killed for want of memory, as a rule
            self._alive = False
            return math.nan, math.nan
        return took * count / done, most * count / done

    def close(self) -> None:
        if self._alive:
            self._pipe.send(0)
        self._process.join()


def error(tied: bool, count: int) -> tuple[float, float]:
    """Of the Gram against float64; and the correlation of the head's Gram with the exact one."""
    model, samples = make_model(tied, "cpu"), make_samples(count)
    found = gram(model, samples, chunk=MICROBATCH).K_NN
    correlation = off_diagonal_correlation(head_gram(model, samples).K_NN, found)
    exact = separate_passes(model.double(), samples)
    norms = exact.diagonal().sqrt()
    return float(((found - exact).abs() / (norms[:, None] * norms)).max()), correlation


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--samples", default="64,128,256")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--exact", type=int, default=8)
    parser.add_argument("--memory-mib", default="64,1024", help="kept between passes; a list")
    parser.add_argument("--separate", type=int, default=32, help="samples passed separately")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--without", default="", help="arms to leave out, by first letters")
    options = parser.parse_args()
    left_out = tuple(w for w in options.without.split(",") if w)
    memory = [float(m) for m in options.memory_mib.split(",")]
    names = [n for n in arms(memory) if n == STEP or not n.startswith(left_out or "-")]
    counts = [int(n) for n in options.samples.split(",")]
    size = sum(p.numel() for p in make_model(options.tied, "cpu").parameters())
    head = "tied" if options.tied else "untied"
    device = torch.cuda.get_device_name() if options.device == "cuda" else "1 thread"
    print(
        heading(
            "coupling.py",
            f"{head} head, {size:,} parameters; {PROMPT} + {ACTION} tokens a sample; "
            f"{options.repeats} repetitions, seed 0, {device}",
        ),
        flush=True,
    )
    workers = {
        name: Worker(
            name,
            options.tied,
            options.device,
            memory,
            options.separate if name == SEPARATE else 0,
        )
        for name in names
    }
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for repeat in range(options.repeats):
        for count in counts:
            for name in names[:: -1 if repeat % 2 else 1]:
                if name != SEPARATE or repeat == 0:
                    found.setdefault((name, count), []).append(workers[name].measure(count))
    for worker in workers.values():
        worker.close()
    show(found, names, counts, options.separate)
    gap, correlation = error(options.tied, options.exact)
    print(f"\nerror {gap:.1e} (float64, {options.exact} samples)  ")
    print(f"correlation of the head's Gram with the exact one: {correlation:.3f}")


def show(
    found: dict[tuple[str, int], list[tuple[float, float]]],
    names: list[str],
    counts: list[int],
    limit: int,
) -> None:
    print("| |" + "".join(f" N={n}: s | ratio | MiB |" for n in counts))
    print("|---|" + "---:|" * 3 * len(counts))
    for name in names:
        cells = ""
        for count in counts:
            took, base = (statistics.median(t for t, _ in found[n, count]) for n in (name, STEP))
            peak = max(m for _, m in found[name, count])
            if math.isnan(took):
                cells += " killed | | |"
                continue
            mark = "~" if name == SEPARATE and count > limit else ""
            cells += f" {mark}{took:.3g} | {mark}{took / base:.2f} | {mark}{peak:,.0f} |"
        print(f"| {name} |{cells}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
