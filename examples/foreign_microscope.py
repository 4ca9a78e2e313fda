"""The microscope on a model that untwine did not train, in a world that untwine does not know.

A small Llama learns to cross halls by a plain policy gradient of some twenty lines. A hall has four
doorways, some of them with a pit: there one must `jump`; elsewhere a jump may end in a fall. So the
same action is good in one state and flawed in another. Then, with `untwine.diagnose` only:

    truth        A* of every (state, action), by playing on from it (restore, step, act)
    calibration  what the group-relative advantage says of flawed steps
    coupling     which samples lift flawed ones
    separation   whether hidden states tell good from flawed

and the same from the command line, on the folder that is written (docs/episodes.md).

    python examples/foreign_microscope.py --out runs/foreign
"""

import argparse
import itertools
import math
import random
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from untwine import diagnose
from untwine.episodes import write_groups
from untwine.errors import UntwineError
from untwine.records import Episode, Group, Label, Observation, Step, TaskRef

WORDS = (
    "<end> ? 0 1 2 3 4 cross the hall you are at doorway of with a pit ahead free way do walk jump"
)
HALLS = list(itertools.product((False, True), repeat=4))  # which doorways have a pit
GROUP, LIMIT, BATCHES = 8, 6, 4


class Place(NamedTuple):
    """A state: the hall, the doorway the agent stands before, actions left, whether it has fallen.

    All texts are of equal length, so that prompts need no padding.
    """

    hall: int
    doorway: int = 0
    left: int = LIMIT
    fallen: bool = False

    @property
    def key(self) -> str:
        return f"hall {self.hall}, doorway {self.doorway}, {self.left} left"

    @property
    def text(self) -> str:
        ahead = "a pit" if (*HALLS[self.hall], False)[self.doorway] else "free way"
        return f"you are at doorway {self.doorway} of 4 with {ahead} ahead"

    @property
    def over(self) -> bool:
        return self.fallen or self.doorway == 4 or self.left == 0

    def seen(self) -> Observation:
        progress = self.doorway / 4
        return Observation(self.text, self.key, progress, progress, self.over, self.doorway == 4)


def do(place: Place, command: str, luck: random.Random) -> Place:
    """Walking into a pit, and half of the jumps where there is none, end in a fall."""
    pit = HALLS[place.hall][place.doorway]
    place = place._replace(left=place.left - 1)
    if command not in ("walk", "jump"):
        return place
    falls = pit if command == "walk" else not pit and luck.random() < 0.5
    return place._replace(fallen=True) if falls else place._replace(doorway=place.doorway + 1)


class Agent:
    """A Llama of some twenty thousand weights that answers with one word."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS.split())}, unk_token="?"))
        words.pre_tokenizer = Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="?", eos_token="<end>", pad_token="<end>"
        )
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, eos_token_id=0,
                bos_token_id=None, initializer_range=0.1,
            )
        )  # fmt: skip
        self.words: list[str] = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        self.luck = random.Random(seed)
        self.known: dict[str, list[float]] = {}

    def prompt(self, text: str) -> list[int]:
        return list(self.tokenizer(f"cross the hall {text} do").input_ids)

    def probabilities(self, text: str) -> list[float]:
        """pi of every word; remembered until the weights change."""
        if text not in self.known:
            ids = torch.tensor([self.prompt(text)])
            with torch.no_grad():
                self.known[text] = self.model(input_ids=ids).logits[0, -1].softmax(-1).tolist()
        return self.known[text]

    def probability(self, text: str, word: str) -> float:
        return self.probabilities(text)[self.words.index(word)]

    def act(self, text: str) -> str:
        return self.luck.choices(self.words, self.probabilities(text))[0]


Ended = Literal["success", "failure", "limit"]
Truth = dict[tuple[str, str], diagnose.Estimate]  # by state and command


class Move(NamedTuple):
    before: Place
    command: str
    after: Place


def play(agent: Agent, hall: int, luck: random.Random) -> list[Move]:
    place, moves = Place(hall), []
    while not place.over:
        command = agent.act(place.text)
        moves.append(Move(place, command, do(place, command, luck)))
        place = moves[-1].after
    return moves


def outcome(moves: list[Move]) -> float:
    return moves[-1].after.doorway / 4


def advantages(group: list[list[Move]]) -> list[float]:
    """(R_g - mean R) / (std R + eps), one for all moves of an episode."""
    returns = [outcome(moves) for moves in group]
    return [(r - mean(returns)) / (stdev(returns) + 1e-6) for r in returns]


def train(agent: Agent, iterations: int, luck: random.Random) -> None:
    """REINFORCE with group-relative advantages; no piece of untwine in it."""
    optimizer = torch.optim.Adam(agent.model.parameters(), lr=3e-3)
    for _ in range(iterations):
        agent.known.clear()
        prompts, words, weights = [], [], []
        for hall in luck.sample(range(len(HALLS)), 6):
            group = [play(agent, hall, luck) for _ in range(GROUP)]
            for moves, advantage in zip(group, advantages(group), strict=True):
                prompts += [agent.prompt(move.before.text) for move in moves]
                words += [move.command for move in moves]
                weights += [advantage] * len(moves)
        logits_NV = agent.model(input_ids=torch.tensor(prompts)).logits[:, -1]
        ids_N = torch.tensor([agent.words.index(word) for word in words])
        losses_N = torch.nn.functional.cross_entropy(logits_NV, ids_N, reduction="none")
        optimizer.zero_grad()
        torch.autograd.backward((losses_N * torch.tensor(weights)).mean())
        optimizer.step()
    agent.known.clear()


def true_advantages(
    agent: Agent, recorded: list[list[list[Move]]], branches: int, luck: random.Random
) -> Truth:
    """A* of every (place, command) on record. What untwine needs to know of the world is three
    functions: how to get back to a state, how to go on from it, and how the policy chooses."""
    now = [Place(0)]

    def restore(place: Place) -> str:
        now[0] = place
        return place.text

    def step(command: str) -> tuple[str, float, bool]:
        now[0] = do(now[0], command, luck)
        return now[0].text, now[0].doorway / 4, now[0].over

    asked = list({(m.before, m.command): None for g in recorded for e in g for m in e})
    found = diagnose.true_advantages(
        asked,
        restore=restore,
        step=step,
        act=agent.act,
        steps_left=[p.left for p, _ in asked],
        probabilities=[agent.probability(p.text, c) for p, c in asked],
        settings=diagnose.BranchSettings(branches=branches),
    )
    return {(p.key, c): one for (p, c), one in zip(asked, found, strict=True)}


def as_groups(
    agent: Agent,
    recorded: list[list[list[Move]]],
    halls: list[int],
    truth: Truth,
) -> list[Group]:
    """What was played, as records of untwine."""
    groups = []
    for number, (hall, group) in enumerate(zip(halls, recorded, strict=True)):
        ref = TaskRef("halls", "cross", hall)
        episodes = []
        for g, (moves, advantage) in enumerate(zip(group, advantages(group), strict=True)):
            end = moves[-1].after
            ended: Ended = "failure" if end.fallen else "limit"
            if end.doorway == 4:
                ended = "success"
            steps = [as_step(agent, t, m, advantage, truth) for t, m in enumerate(moves)]
            score = outcome(moves)
            name = f"{number}-{g}"
            episodes.append(
                Episode(name, ref, "cross the hall", tuple(steps), score, score, score == 1, ended)
            )
        groups.append(Group(ref, tuple(episodes)))
    return groups


def as_step(
    agent: Agent,
    t: int,
    move: Move,
    advantage: float,
    truth: Truth,
) -> Step:
    judged = truth.get((move.before.key, move.command))
    labels: tuple[Label, ...] = ()
    if judged and judged.label != "neutral":
        labels = (Label("branch", judged.label, "advantage", judged.confidence or 1.0),)
    return Step.played(
        t,
        move.before.seen(),
        move.command,
        move.after.seen(),
        prompt_ids=tuple(agent.prompt(move.before.text)),
        action_ids=(agent.words.index(move.command),),
        logprobs=(math.log(agent.probability(move.before.text, move.command)),),
        labels=labels,
        advantage=advantage,
    )


def look(agent: Agent, groups: list[Group], truth: Truth) -> None:
    """Calibration, coupling and separation from plain lists and token ids."""
    steps = [(g, e, s) for g, group in enumerate(groups) for e in group.episodes for s in e.steps]
    sign = {"good": 1, "flawed": -1, "neutral": 0}
    found = [truth[s.state_key, s.text] for _, _, s in steps]
    names = list(dict.fromkeys((g, e.id) for g, e, _ in steps))
    credit = [s.advantage or 0.0 for _, _, s in steps]
    judged = diagnose.Judged.of(
        estimates=credit,
        verdicts=[sign[one.label] for one in found],
        advantages=[one.advantage for one in found],
        groups=[g for g, _, _ in steps],
        episodes=[names.index((g, e.id)) for g, e, _ in steps],
    )
    numbers = diagnose.calibrate(judged)
    print(f"calibration: {numbers['flawed']} of {numbers['steps']} steps are flawed")
    print(f"  mean advantage of flawed steps {numbers['flawed_mean']}")
    print(f"  P(advantage > 0 | flawed) {numbers['miscalibration']}")
    print(f"  rank correlation with A* {numbers['rank_correlation']:.2f}")

    keys = [(s.prompt_ids, s.action_ids) for _, _, s in steps]
    merged = diagnose.merge_duplicates(keys, [c / len(steps) for c in credit])
    samples = [diagnose.StepSample(*keys[i]) for i in merged.first]
    flawed = torch.tensor([found[i].label == "flawed" for i in merged.first])
    exact = diagnose.gram(agent.model, samples)
    print(f"coupling: {diagnose.reinforced_rates(exact.K_NN, merged.weights, flawed)['all']}")
    for offender in diagnose.worst_offenders(exact.K_NN, merged.weights, flawed, count=3):
        lifted = steps[merged.first[offender.sample]][2]
        pusher = steps[merged.first[offender.pushers[0][0]]][2]
        print(f"  {lifted.text!r} ({lifted.observation})")
        print(f"    is lifted most by {pusher.text!r} ({pusher.observation})")
    honesty = diagnose.check_prediction(agent.model, samples, merged.weights, exact.K_NN)
    print(f"  predicted against measured change: correlation {honesty.correlation:.3f}")
    cheap = diagnose.head_gram(agent.model, samples)
    correlation = diagnose.off_diagonal_correlation(cheap.K_NN, exact.K_NN)
    print(f"  Gram of the head alone, forward only: correlation {correlation:.2f}")

    kept = [i for i, u in enumerate(merged.first) if found[u].label != "neutral"]
    halls = [steps[merged.first[i]][1].ref.variation for i in kept]
    print("separation:")
    try:
        states = diagnose.action_states(agent.model, [samples[i] for i in kept])
        rows = diagnose.separations(states, flawed[kept], halls)
    except UntwineError as error:  # few branches leave most steps neutral
        print(f"  {error}; raise --branches")
        return
    for row in rows:
        accuracy = "–" if row.balanced is None else f"{row.balanced:.2f}"
        print(f"  layer {row.layer}: probe {accuracy}, silhouette {row.silhouette:.2f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/foreign"))
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--branches", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    luck = random.Random(options.seed)
    agent = Agent(options.seed)
    train(agent, options.iterations, luck)
    agent.model.save_pretrained(options.out / "model")
    agent.tokenizer.save_pretrained(options.out / "model")
    for number in range(BATCHES):
        halls = luck.sample(range(len(HALLS)), 8)
        recorded = [[play(agent, hall, luck) for _ in range(GROUP)] for hall in halls]
        judged = recorded if number == BATCHES - 1 else []  # only the last batch is looked at
        truth = true_advantages(agent, judged, options.branches, luck)
        groups = as_groups(agent, recorded, halls, truth)
        write_groups(options.out / f"episodes/iter-{number:06d}.jsonl.gz", groups)
    print(f"mean return {mean(outcome(e) for g in recorded for e in g):.2f}")
    look(agent, groups, truth)
    print("the same from the command line:")
    print(f"  untwine diagnose calibration {options.out} --labels branch")
    print(f"  untwine diagnose coupling {options.out}")
    print(f"  untwine diagnose separation {options.out}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
