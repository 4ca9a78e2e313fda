"""The coupling Gram against one ordinary training step over the same samples.

    python benchmarks/gram.py [--samples 64,128,256] [--repeats 3] [--tied] [--device cpu]

A Llama of eight layers (6.8 million parameters, 7.9 untied); samples of 250 prompt and 8 action
tokens. Within a repetition all contenders run one after the other; the table gives medians of
seconds (of processor time on a CPU), and their ratio to the training step in micro-batches of 16.
`error` is the largest |K - K'| / (|g_i| |g_j|) against separate backward passes in float64, on the
first `--exact` samples. Memory is the growth of the peak resident set, each contender in a process
of its own (CPU), or the peak allocated (CUDA).
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from untwine.diagnose.coupling import gram, head_gram, off_diagonal_correlation
from untwine.diagnose.samples import StepSample
from untwine.diagnose.scoring import weighted_gradient

VOCABULARY, PROMPT, ACTION, MICROBATCH = 4096, 250, 8, 16
Contender = Callable[[Any, Sequence[StepSample]], Any]


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
    rows = []
    for sample in samples:
        grads = weighted_gradient(model, [sample], torch.ones(1))
        rows.append(torch.cat([g.flatten() for g in grads.values()]))
    matrix = torch.stack(rows)
    return matrix @ matrix.T


CONTENDERS: dict[str, Contender] = {
    "training step, micro-batches of 16": training_step,
    "exact Gram": lambda model, samples: gram(model, samples, chunk=MICROBATCH, check=False),
    "exact Gram, recompute": lambda model, samples: gram(
        model, samples, chunk=MICROBATCH, recompute=True, check=False
    ),
    "head only, forward": lambda model, samples: head_gram(model, samples, chunk=MICROBATCH),
    "separate passes, gradients stored": separate_passes,
}


def seconds(contender: Contender, model: Any, samples: Sequence[StepSample]) -> float:
    """Seconds of this process's one thread on a CPU, whatever else runs; wall time with CUDA."""
    if next(model.parameters()).device.type != "cuda":
        start = time.process_time()
        contender(model, samples)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    contender(model, samples)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(name: str, count: int, tied: bool, device: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    model, samples = make_model(tied, device), make_samples(count)
    training_step(model, samples[:2])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        CONTENDERS[name](model, samples)
        pipe.send((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    before = _peak()
    CONTENDERS[name](model, samples)
    pipe.send((_peak() - before) / 2**10)


def _peak() -> int:
    """Peak resident set in KiB. Not `ru_maxrss`: a new process inherits that of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory(name: str, count: int, tied: bool, device: str) -> float:
    """MiB at the peak above what model and libraries take, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_memory, args=(name, count, tied, device, there))
    process.start()
    there.close()  # so that a process that dies ends the wait
    found: float = here.recv()
    process.join()
    return found


def error(model: Any, samples: Sequence[StepSample]) -> float:
    found = gram(model, samples, chunk=MICROBATCH, check=False).K_NN
    exact = separate_passes(model.double(), samples).cpu()
    model.float()
    norms = exact.diagonal().sqrt()
    return float(((found - exact).abs() / (norms[:, None] * norms)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--samples", default="64,128,256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exact", type=int, default=12)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--without", default="", help="contenders to leave out, by first letters")
    options = parser.parse_args()
    left_out = [w for w in options.without.split(",") if w]
    names = [n for n in CONTENDERS if not any(n.startswith(w) for w in left_out)]
    model = make_model(options.tied, options.device)
    counts = [int(n) for n in options.samples.split(",")]
    print(f"Date: {datetime.date.today()}; machine: {_machine(options.device)}  ")
    size = sum(p.numel() for p in model.parameters())
    print(f"{'tied' if options.tied else 'untied'} head, {size:,} parameters, ", end="")
    print(f"{options.repeats} repetitions\n")
    heads = "".join(f" N={n} s | ratio | MiB |" for n in counts)
    print(f"| |{heads}\n|---|{'---:|' * 3 * len(counts)}")
    cells: dict[str, str] = dict.fromkeys(names, "")
    for count in counts:
        samples = make_samples(count)
        training_step(model, samples[:2])
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name in names:
                times[name].append(seconds(CONTENDERS[name], model, samples))
        base = statistics.median(times[names[0]])
        for name in names:
            median = statistics.median(times[name])
            peak = memory(name, count, options.tied, options.device)
            cells[name] += f" {median:.3g} | {median / base:.2f} | {peak:,.0f} |"
    for name in names:
        print(f"| {name} |{cells[name]}")
    some = make_samples(options.exact)
    exact = gram(model, some, chunk=MICROBATCH).K_NN
    print(f"\nerror {error(model, some):.1e} (float64, {options.exact} samples)")
    correlation = off_diagonal_correlation(head_gram(model, some).K_NN, exact)
    print(f"correlation of the head's Gram with the exact one: {correlation:.3f}")


def _machine(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} cores, one thread, Python {platform.python_version()}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
