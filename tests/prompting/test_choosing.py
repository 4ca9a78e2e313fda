"""Choice among commands inside `<action>`, after text that is free."""

from __future__ import annotations

import pytest
import torch

from tests.policy.test_choices import COMMANDS, plain_choice_logprob
from untwine.batch import policy_rows
from untwine.config import PromptConfig, SamplingConfig
from untwine.demonstrations import demonstration, play_experts
from untwine.diagnose.run_samples import step_sample
from untwine.diagnose.scoring import log_probabilities
from untwine.envs.pool import EnvPool
from untwine.policy.choices import Later, allowed_along
from untwine.policy.loading import Policy
from untwine.policy.sampler import Sampler
from untwine.prompting.choosing import command_choices
from untwine.prompting.prompter import Prompter, reply_text
from untwine.records import Group, TaskRef
from untwine.rollout import Collector
from untwine.scoring import score

FORMS = [
    PromptConfig(tags=True),
    PromptConfig(tags=True, verb_last=True),
    PromptConfig(thoughts=True),
]


@pytest.mark.parametrize("config", FORMS, ids=["tags", "verb last", "thoughts"])
def test_the_choice_begins_inside_the_action(policy: Policy, config: PromptConfig) -> None:
    """Every written reply can be given; its text before the command is free, and inside it each
    token is chosen among those with which some command goes on."""
    prompter = Prompter(policy.chat, config)
    choices = command_choices(prompter).among(COMMANDS)
    said = "<planning>go > on</planning>"
    written = [prompter.written_ids(f"{said}{reply_text(config, c)}") for c in COMMANDS]
    for own in written:
        allowed = allowed_along(choices, own)
        assert allowed is not None
        start = sum(not among for among in allowed)
        assert policy.chat.decode(own[:start])[0] == f"{said}<action>"
        for t in range(start, len(own)):
            assert set(allowed[t]) == {r[t] for r in written if len(r) > t and r[:t] == own[:t]}
    other = prompter.written_ids(f"{said}<action>sing</action>")
    assert allowed_along(choices, other) is None
    assert allowed_along(choices, prompter.chat.word_ids("no action at all")) is None


@pytest.mark.parametrize("config", FORMS, ids=["tags", "verb last", "thoughts"])
def test_logprobs_follow_the_definition(policy: Policy, config: PromptConfig) -> None:
    """A policy that is made to write `<action>` early: log-probabilities are those of the whole
    vocabulary before it, and inside it those of the definition."""
    prompter = Prompter(policy.chat, config)
    choices = command_choices(prompter).among(COMMANDS)
    assert isinstance(choices, Later)
    mark = prompter.chat.word_ids("<action>")
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=5), torch.Generator().manual_seed(1))
    prompts = {s: (5 + s, 9, 30) for s in range(6)}
    opened = Later(  # after one to three tokens, as the first one says
        lambda ids: choices.node_after((*ids, *mark)) if len(ids) > ids[0] % 3 else None
    )
    samples = sampler.sample(prompts, dict.fromkeys(prompts, opened))
    endings = [prompter.reply_ids(command)[len(mark) :] for command in COMMANDS]
    lengths = set()
    for slot, sample in samples.items():
        assert sample.allowed is not None
        free = sum(not among for among in sample.allowed)
        lengths.add(free)
        assert sample.ids[free:] in endings
        prompt = [*prompts[slot], *sample.ids[:free]]
        expected = plain_choice_logprob(policy, prompt, endings, sample.ids[free:])
        assert sum(sample.logprobs[free:]) == pytest.approx(expected, abs=1e-5)
        whole = torch.tensor([[*prompts[slot], *sample.ids[:free]]])
        with torch.no_grad():
            logits = policy.model(input_ids=whole, use_cache=False).logits[0, 2:-1].double()
        own = logits.log_softmax(-1).gather(-1, whole[0, 3:, None])[:, 0]
        assert torch.tensor(sample.logprobs[:free]).double() == pytest.approx(own, abs=1e-5)
    assert len(lengths) > 1  # some replies have begun their command while others have not


def test_a_token_that_goes_past_the_mark(policy: Policy) -> None:
    """Some tokenizers write `>` and the first letters as one token."""
    prompter = Prompter(policy.chat, FORMS[0])
    chat = prompter.chat
    choices = command_choices(prompter).among(COMMANDS)
    assert isinstance(choices, Later)

    pieces = {-1: ">op", -2: ">\n", -3: ">sing"}

    class Merged:
        end_ids = chat.end_ids
        reply_ids = staticmethod(chat.reply_ids)

        def piece(self, token: int) -> str:
            return pieces.get(token) or chat.piece(token)

        def decode(self, ids: tuple[int, ...]) -> tuple[str, bool]:
            before, ended = chat.decode(tuple(i for i in ids if i >= 0))
            return before + "".join(pieces[i] for i in ids if i < 0), ended

    prompter.chat = Merged()  # type: ignore[assignment]
    merged = command_choices(prompter).among(COMMANDS)
    assert isinstance(merged, Later)

    def first_end(last: int) -> str:
        node = merged.node_after((*chat.word_ids("<action"), last))
        ids: list[int] = []
        while node:
            token, node = next(iter(node.items()))
            ids.append(token)
        text, over = chat.decode(tuple(ids))
        assert over == bool(ids)
        return text

    assert first_end(-1) == "en door to kitchen</action>"
    assert first_end(-2).removesuffix("</action>") in COMMANDS
    assert first_end(-3) == ""  # the reply is over
    assert merged.node_after((*chat.word_ids("<action"), -3)) == {}
    assert choices.node_after(chat.word_ids("<action>sing</action>")) == {}
    assert choices.node_after(chat.word_ids("<b>action</b>")) is None


def test_in_an_environment(policy: Policy) -> None:
    """Sampled steps are trained with the log-probabilities they were drawn with, by the update and
    by the diagnoses; what experts wrote can be given."""
    prompt = PromptConfig(tags=True, verb_last=True)
    sampling = SamplingConfig(constrained=True, max_new_tokens=4)
    refs = [TaskRef("rooms", "fetch", k) for k in range(3)]
    with EnvPool("rooms", {"list_commands": True}, workers=0, sessions=4, timeout_s=5) as pool:
        collector = Collector(policy, pool, 4, prompt, sampling)
        opened = collector.choices
        assert opened is not None
        mark = policy.chat.word_ids("<explore>x</explore><action>")
        free = opened.among

        def forced(commands: list[str]) -> Later:
            later = free(commands)
            assert isinstance(later, Later)
            return Later(lambda ids: later.node_after(mark) if len(ids) == 2 else None)

        opened.among = forced  # type: ignore[method-assign,assignment]
        groups, _ = collector.collect(refs, 2, torch.Generator().manual_seed(0))
        expert = play_experts(pool, refs, 12)[0]
        opened.among = free  # type: ignore[method-assign]
    written = demonstration(expert, collector.prompter, choices=opened)
    assert all(step.advantage == 1.0 and step.allowed for step in written.steps)
    groups = [
        Group(g.ref, g.episodes).with_advantages([[1.0] * e.length for e in g.episodes])
        for g in groups
    ]
    steps = [step for g in groups for e in g.episodes for step in e.steps]
    assert all(step.allowed and step.allowed[:2] == ((), ()) for step in steps)
    rows = policy_rows(groups, "token")
    with torch.no_grad():
        targets = score(policy, rows)
    assert len(targets.ids_N) > 2 * len(steps)
    assert targets.logprobs_N.numpy() == pytest.approx(targets.old_logprobs_N.numpy(), abs=1e-5)
    again = log_probabilities(policy.model, [step_sample(step) for step in steps])
    assert again == pytest.approx([sum(step.logprobs) for step in steps], abs=1e-5)
