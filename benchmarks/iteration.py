"""One iteration of training in ALFWorld: untwine, TRL, and padded samples; in turn, one table.

    python benchmarks/iteration.py [--turns 20] [--repeats 3] [--arms untwine,padded,...]

An iteration is rollout, credit, and one optimizer step. Every arm starts from the same tiny model,
warmed up by imitation, and plays the same games of native ALFWorld with the same prompts, the same
cap on tokens per reply, and the same number of replies: the games go on when they are won. Returns
are the share of commands that were understood, so the groups have spread. Arms:

untwine          Collector, credit and Updater, as the training loop uses them
padded           every turn reads the whole history again, every step is a padded sample of its own
trl rollout      TRL's GRPOTrainer with a `rollout_func` that calls `generate` at every turn
trl environment  TRL's GRPOTrainer with an `environment_factory`

Each arm lives in a process of its own, loads and does one iteration that is not counted; then all
take turns. Times are medians, with one thread those of the processor. The TRL arms need
`pip install -c constraints.txt -e '.[bench]'` and are left out without it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from arms.alternate import Answer, Pipe, Worker
from arms.machine import heading
from arms.world import Count, Setting, warm_up

ARMS = {
    "untwine": "arms.ours:run",
    "padded": "arms.padded:run",
    "trl rollout": "arms.trl_trainer:run_rollout",
    "trl environment": "arms.trl_trainer:run_environment",
}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8, help="episodes per group")
    parser.add_argument("--turns", type=int, default=20, help="replies per episode")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens per reply, at most")
    parser.add_argument("--examples", type=int, default=0, help="worked games in every prompt")
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=300, help="steps of imitation")
    parser.add_argument(
        "--least-valid",
        type=float,
        default=0.1,
        help="stop where a smaller share of the replies is understood: such a model does not act",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", default=",".join(ARMS), help="which ones, with commas between")
    parser.add_argument("--model", type=Path, help="a warmed model; by default it is made")
    parser.add_argument("--play", help=argparse.SUPPRESS)  # the arm that this process is
    return parser.parse_args()


def chosen_arms(names: Sequence[str]) -> list[str]:
    """The arms that can run here."""
    if unknown := set(names) - set(ARMS):
        sys.exit(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    if importlib.util.find_spec("trl"):
        return list(names)
    if left := [name for name in names if name.startswith("trl")]:
        print(
            f"Left out, since trl is not installed: {', '.join(left)} "
            "(`pip install -c constraints.txt -e '.[bench]'`).\n"
        )
    return [name for name in names if name not in left]


def measure(
    setting: Setting, arms: Sequence[str], model: Path, least_valid: float
) -> dict[str, list[Answer]]:
    """The counted iterations of every arm."""
    command = [str(Path(__file__).resolve()), *sys.argv[1:], "--model", str(model)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the arms are ended too
    workers: list[Worker] = []
    answers: dict[str, list[Answer]] = {name: [] for name in arms}
    try:
        for name in arms:
            workers.append(Worker(name, [*command, "--play", name], setting.threads))
            check(setting, name, workers[-1].iterate().count, least_valid)
        for _ in range(setting.repeats):
            for worker in workers:
                answer = worker.iterate()
                check(setting, worker.name, answer.count, least_valid)
                answers[worker.name].append(answer)
    finally:
        for worker in workers:
            worker.close()
    return answers


def check(setting: Setting, name: str, count: Count, least_valid: float) -> None:
    """Stop where an arm did less than it should. An empty reply ends an episode of TRL's own loop,
    so a few steps may be missing."""
    wanted = setting.episodes * setting.turns
    if count.episodes != setting.episodes or not 0.95 * wanted <= count.steps <= wanted:
        sys.exit(
            f"arm {name!r} played {count.episodes} episodes, {count.steps} steps, not {wanted}"
        )
    print(f"{name}: {count.seconds:.3g} s, {count.valid} understood", file=sys.stderr, flush=True)
    if count.valid < least_valid * wanted:
        sys.exit(
            f"arm {name!r} does not act: of {wanted} replies {count.sent} were commands and "
            f"{count.valid} were understood; raise --warm-up"
        )


def table(answers: dict[str, list[Answer]]) -> list[str]:
    lines = [
        "| | s per iteration | of it rollout | episodes/s | tokens/s | sampled tokens/s | steps "
        "| tokens | understood | peak memory | of it work | time |",
        "|---|" + "---:|" * 11,
    ]
    first = next(iter(answers.values()))
    base = median(a.count.seconds / a.count.episodes for a in first)
    for name, found in answers.items():
        counts = [answer.count for answer in found]
        seconds = median(c.seconds for c in counts)
        cells = [
            name,
            f"{seconds:.3g}",
            f"{median(c.seconds_rollout for c in counts):.3g}",
            f"{median(c.episodes / c.seconds for c in counts):.3g}",
            f"{median(c.tokens / c.seconds for c in counts):,.0f}",
            f"{median(c.sampled / c.seconds for c in counts):,.0f}",
            f"{median(c.steps for c in counts):g}",
            f"{median(c.tokens for c in counts):,g}",
            f"{100 * median(c.valid / c.steps for c in counts):.0f} %",
            f"{found[-1].peak / 1e6:,.0f} MB",
            f"{(found[-1].peak - found[-1].at_start) / 1e6:,.0f} MB",
            f"{median(c.seconds / c.episodes for c in counts) / base:.1f} x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    options = read_options()
    setting = Setting(
        groups=options.groups,
        group_size=options.group_size,
        turns=options.turns,
        new_tokens=options.new_tokens,
        hidden=options.hidden,
        layers=options.layers,
        warm_up=options.warm_up,
        repeats=options.repeats,
        seed=options.seed,
        threads=options.threads,
        examples=options.examples,
    )
    if options.play:
        module, _, function = ARMS[options.play].partition(":")
        pipe = Pipe()
        getattr(importlib.import_module(module), function)(setting, options.model, pipe)
        return
    arms = chosen_arms(options.arms.split(","))
    if options.model and not (options.model / "config.json").is_file():
        sys.exit(f"{options.model} is no model folder; leave out --model and one is made")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or warm_up(setting, Path(folder) / "warm-up")
        answers = measure(setting, arms, model, options.least_valid)
    print(
        heading(
            "iteration.py",
            f"{setting.episodes} episodes of {setting.turns} replies ({setting.groups} groups of "
            f"{setting.group_size}), at most {setting.new_tokens} tokens each; {setting.examples} "
            f"worked games in every prompt; Llama with hidden "
            f"size {setting.hidden} and {setting.layers} layers; seed {setting.seed}, "
            f"{setting.threads} thread{'s' if setting.threads > 1 else ''}, "
            f"{setting.repeats} repeats",
        )
    )
    print("\n".join(table(answers)))


if __name__ == "__main__":
    main()
