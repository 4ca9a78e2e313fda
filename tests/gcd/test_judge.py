"""The judge against a real HTTP server that is well, down, slow, or talks nonsense."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import REF, make_episode, make_step
from tests.gcd.judge_server import (
    Handler,
    Server,
    good_north,
    mute,
    serving,
    trickle,
    trickle_headers,
)
from untwine.batch import Row, distinct_tokens
from untwine.config import JudgeConfig, PolicyConfig, PromptConfig
from untwine.errors import ConfigError, ModelError, UntwineError
from untwine.gcd.sources import opinions
from untwine.gcd.sources.answers import AnswerFile
from untwine.gcd.sources.endpoint import Completion, Endpoint, EndpointError
from untwine.gcd.sources.opinions import LocalJudge, Opinion, RemoteJudge, read
from untwine.policy.loading import Policy
from untwine.prompting.prompter import JUDGE_SYSTEM, verdict_text
from untwine.scoring import Targets, score

TEXTS = [f"You are here.\n\nAction: {what}\nGood or bad?" for what in ("go north", "eat", "sit")]


def config(url: str, **values: Any) -> JudgeConfig:
    return JudgeConfig(url=url, model="m", retries=1, at_once=2, **values)


def ask(
    server: Server | str, folder: Path, texts: list[str] = TEXTS, **values: Any
) -> list[Opinion]:
    url = server if isinstance(server, str) else server.url
    judge = RemoteJudge(config(url, **values), AnswerFile(folder / "judge.jsonl"))
    return judge.ask(texts, lambda: None)


def test_verdicts_confidence_and_what_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(good_north) as server:
        found = ask(server, tmp_path, key_variable="MY_KEY", confidence=0.7)
        (first, *_) = server.requests
    assert [o.verdict for o in found] == ["good", "flawed", "flawed"]
    assert {o.confidence for o in found} == {0.7}
    assert {(o.how, o.tokens) for o in found} == {("answered", 10)}
    assert first["path"] == "/v1/chat/completions"
    assert first["Authorization"] == "Bearer secret"
    assert first["body"]["temperature"] == 0
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with serving(good_north) as server:
        first = ask(server, tmp_path)
        again = ask(server, tmp_path)
        assert len(server.requests) == 3
    assert [o.verdict for o in again] == [o.verdict for o in first]
    assert {(o.how, o.tokens) for o in again} == {("kept", 0)}
    # what a crash tore is asked again, and does not spoil the lines after it
    file = tmp_path / "judge.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    with serving(good_north) as server:
        found = ask(server, tmp_path)
        assert sorted(o.how for o in found) == ["answered", "kept", "kept"]
        assert {o.how for o in ask(server, tmp_path)} == {"kept"}


def test_equal_questions_are_asked_and_paid_for_once(tmp_path: Path) -> None:
    with serving(good_north) as server:
        found = ask(server, tmp_path, [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]])
        assert len(server.requests) == 2
    assert [o.verdict for o in found] == ["good", "flawed", "good", "good"]
    assert [o.how for o in found] == ["answered", "answered", "kept", "kept"]
    assert [o.tokens for o in found] == [10, 10, 0, 0]
    for how in ("failed", "nonsense"):
        behave = failing(99, 401) if how == "failed" else lambda handler, _: handler.say("Hm.")
        with serving(behave) as server:
            again = ask(server, tmp_path / how, [TEXTS[0], TEXTS[0]])
            assert len(server.requests) == 1
        assert [o.how for o in again] == [how, how]


def test_an_answer_that_was_cut_off_while_thinking_is_paid_for(tmp_path: Path) -> None:
    """Servers of models that reason then send no content, and what it has cost."""
    with serving(lambda handler, _: handler.say(None)) as server:
        for _ in range(2):
            (found,) = ask(server, tmp_path, TEXTS[:1])
            assert found.how == "nonsense"
        assert len(server.requests) == 1
    assert AnswerFile(tmp_path / "judge.jsonl").spent == 10


def test_budget_of_tokens(tmp_path: Path) -> None:
    with serving(good_north) as server:
        found = ask(server, tmp_path, token_budget=15)
        assert [o.how for o in found] == ["answered", "answered", "skipped"]  # two at once
        assert [o.how for o in ask(server, tmp_path, token_budget=15)] == [
            "kept", "kept", "skipped",
        ]  # fmt: skip


def failing(times: int, status: int) -> Any:
    left = [times]

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] >= 0:
            handler.reply(b"no", status)
        else:
            good_north(handler, body)

    return behave


def test_a_failure_that_may_pass_is_tried_again(tmp_path: Path) -> None:
    with serving(failing(1, 503)) as server:
        assert ask(server, tmp_path, TEXTS[:1])[0].verdict == "good"
        assert len(server.requests) == 2


def test_a_failure_that_stays_is_not(tmp_path: Path) -> None:
    with serving(failing(9, 401)) as server:
        (found,) = ask(server, tmp_path, TEXTS[:1])
        assert (found.how, found.reason) == ("failed", "status 401: no")
        assert len(server.requests) == 1


def refusing(*names: str) -> Any:
    """A server that takes none of these parameters, and says so one at a time."""

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        for name in names:
            if name in body:
                said = f"Unsupported parameter: '{name}' is not supported with this model."
                handler.reply(json.dumps({"error": {"message": said}}).encode(), 400)
                return
        good_north(handler, body)

    return behave


def test_a_parameter_that_the_server_refuses_is_left_out(tmp_path: Path) -> None:
    with serving(refusing("max_tokens", "temperature", "top_logprobs")) as server:
        found = ask(server, tmp_path, logprobs=True)
        last = server.requests[-1]["body"]
        assert [o.verdict for o in found] == ["good", "flawed", "flawed"]
        assert last["max_completion_tokens"] == 1024
        assert {"max_tokens", "temperature", "top_logprobs"}.isdisjoint(last)
        assert len(server.requests) <= 3 + 2 * 3  # two threads may learn it side by side


def test_what_an_error_says_is_kept(tmp_path: Path) -> None:
    with serving(refusing("model")) as server:
        (found,) = ask(server, tmp_path, TEXTS[:1])
        assert len(server.requests) == 1
    assert found.how == "failed"
    assert found.reason == (
        "status 400: Unsupported parameter: 'model' is not supported with this model."
    )


def test_the_key_follows_no_redirect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(good_north) as other:

        def elsewhere(handler: Handler, body: dict[str, Any]) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{other.url}/chat/completions")
            handler.end_headers()

        with serving(elsewhere) as server:
            (found,) = ask(server, tmp_path, TEXTS[:1])
        assert (found.how, found.reason) == ("failed", "status 302")
        assert other.requests == []


@pytest.mark.parametrize("behaviour", [mute, trickle, trickle_headers])
def test_slow_endpoint(tmp_path: Path, behaviour: Any) -> None:
    with serving(behaviour) as server:
        (found,) = ask(server, tmp_path, TEXTS[:1], timeout_s=0.3)
        assert (found.how, found.reason) == ("failed", "no answer within 0.3 seconds")
        assert len(server.requests) == 2


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_endpoint_that_is_down_is_left_alone_after_a_while(tmp_path: Path) -> None:
    texts = [f"Action: {n}\n" for n in range(9)]
    found = ask(closed_port(), tmp_path, texts)
    assert [o.how for o in found] == ["failed"] * 4 + ["skipped"] * 5  # two at once, patience 3
    assert "not reachable" in found[0].reason
    assert {o.verdict for o in found} == {None}


NONSENSE = [
    b"<html>hello</html>",
    b"[]",
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": "none"}',
    b"\xff\xfe",
    b"",
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", NONSENSE)
def test_nonsense_instead_of_an_answer(tmp_path: Path, body: bytes) -> None:
    with serving(lambda handler, _: handler.reply(body)) as server:
        (found,) = ask(server, tmp_path, TEXTS[:1])
    assert (found.how, found.verdict) == ("failed", None)
    assert "nonsense" in found.reason
    assert (tmp_path / "judge.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("text", "how", "verdict"),
    [
        ("good", "answered", "good"),
        (" **Bad**, because", "answered", "flawed"),
        ("<think>bad? no</think>\nGood.", "answered", "good"),
        ("unsure", "unsure", None),
        ("not good", "nonsense", None),
        ("goodness me", "nonsense", None),
        ("", "nonsense", None),
        ("42", "nonsense", None),
    ],
)
def test_reading_an_answer(text: str, how: str, verdict: str | None) -> None:
    found = read(Completion(text, {}, 3), 0.8)
    assert (found.how, found.verdict, found.tokens) == (how, verdict, 3)


def test_confidence_from_log_probabilities(tmp_path: Path) -> None:
    tops = [
        {"token": " good", "logprob": math.log(0.6)},
        {"token": "bad", "logprob": math.log(0.2)},
    ]
    logprobs = {"content": [{"top_logprobs": tops}]}
    with serving(lambda handler, _: handler.say("good", logprobs)) as server:
        (found,) = ask(server, tmp_path, TEXTS[:1], logprobs=True)
        assert server.requests[0]["body"]["logprobs"] is True
    assert found.confidence == pytest.approx((0.6 - 0.2) / 0.8)


def sure(text: str, **probabilities: float) -> Opinion:
    words = {word: math.log(p) for word, p in probabilities.items()}
    return read(Completion(text, words, 3), 0.6)


def test_a_word_that_is_not_listed_is_less_likely_than_all_that_are() -> None:
    found = sure("good", good=0.95, well=0.03, better=0.01)
    assert (found.verdict, found.confidence) == ("good", pytest.approx(0.94 / 0.96))
    rest = sure("bad", bad=0.99)  # at most .01 is left for "good"
    assert (rest.verdict, rest.confidence) == ("flawed", pytest.approx(0.98))
    assert sure("bad", bad=0.95, good=0.05).confidence < rest.confidence


def test_candidates_for_another_word_are_not_read() -> None:
    """What stands first here is not the verdict, so nothing is known of how sure it is."""
    aloud = sure("<think>good question</think> bad", good=0.3, bad=0.01)
    assert (aloud.verdict, aloud.confidence) == ("flawed", 0.6)
    bold = sure("**bad**", good=0.3, bad=0.01)
    assert (bold.verdict, bold.confidence) == ("flawed", 0.6)
    missing = sure("bad", perhaps=0.5)
    assert (missing.verdict, missing.confidence) == ("flawed", 0.6)


def test_nonsense_log_probabilities_are_left_out(tmp_path: Path) -> None:
    odd = ["NaN", 10**400, 1.0]
    for bad in ["x", [], *({"content": [{"top_logprobs": [top(x)]}]} for x in odd)]:
        with serving(lambda handler, _, bad=bad: handler.say("good", bad)) as server:
            answer = Endpoint(config(server.url)).ask([{"role": "user", "content": "?"}])
        assert answer.words == {}


def test_an_answer_without_end_is_cut_off(tmp_path: Path) -> None:
    def flood(handler: Handler, body: dict[str, Any]) -> None:
        handler.reply(b" " * (1 << 22))

    with (
        serving(flood) as server,
        pytest.raises(EndpointError, match="more than 1048576 bytes"),
    ):
        Endpoint(JudgeConfig(url=server.url, model="m")).ask([])


def top(logprob: Any) -> dict[str, Any]:
    return {"token": "good", "logprob": logprob}


@pytest.mark.parametrize("key", ["with\nline", "schlüssel", "\x07"])
def test_a_key_that_cannot_be_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match=r"the key in \$OPENAI_API_KEY has characters") as caught:
        Endpoint(JudgeConfig(url="http://localhost:1", model="m"))
    assert key not in str(caught.value)


def test_the_end_of_a_line_after_a_key_is_not_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    with serving(good_north) as server:
        ask(server, tmp_path, TEXTS[:1])
        assert server.requests[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x/v1",
        "http://",
        "http://[::1/v1",
        "http://x:port",
        f"http://{'x' * 99}",
    ],
)
def test_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address; use one such as http://localhost"):
        Endpoint(JudgeConfig(url=url, model="m"))
    with pytest.raises(ConfigError, match=r"needs gcd\.judge\.model"):
        Endpoint(JudgeConfig(url="http://localhost:1"))


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        AnswerFile(tmp_path / "file" / "judge.jsonl")


def test_answers_outlive_a_cache_that_takes_no_more(tmp_path: Path) -> None:
    file = tmp_path / "judge.jsonl"
    answers = AnswerFile(file)
    assert file.read_text() == ""  # tried before anything is paid for
    file.unlink()
    file.mkdir()
    with serving(good_north) as server:
        judge = RemoteJudge(config(server.url), answers)
        assert [o.how for o in judge.ask(TEXTS, lambda: None)] == ["answered"] * 3
        assert [o.how for o in judge.ask(TEXTS, lambda: None)] == ["kept"] * 3
    assert "judge.jsonl takes no more answers" in judge.complaint()


def test_damaged_answers_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "judge.jsonl"
    endless = '{"key": "e", "text": "good", "words": {}, "tokens": Infinity}'
    lines = [
        '{"key": 1}',
        "nonsense",
        endless,
        '{"key": "k", "text": "good", "words": {}, "tokens": 4}',
    ]
    file.write_text("\n".join([*lines, json.dumps([1])]) + "\n")
    answers = AnswerFile(file)
    assert answers.spent == 4
    assert answers.get("k") == Completion("good", {}, 4)


def test_local_judge_compares_the_two_words(policy: Policy, tmp_path: Path) -> None:
    """Against a plain forward pass over each whole reply."""
    policy.save(tmp_path / "judge")
    settings = JudgeConfig(model=str(tmp_path / "judge"))
    judge = LocalJudge(settings, PolicyConfig(device="cpu"), budget=200)
    steps = [make_step(t, state=f"s{t}", command=f"go {t}") for t in range(4)]
    episode = make_episode(0.0, steps, ref=REF)
    texts = [verdict_text(episode, t, PromptConfig(history=8)) for t in range(4)]
    found = judge.ask(texts, lambda: None)
    for text, opinion in zip(texts, found, strict=True):
        prompt = policy.chat.opening(JUDGE_SYSTEM, text)
        sums = []
        for word in ("good", "bad"):
            ids = [*prompt, *policy.chat.word_ids(word)]
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([ids])).logits[0].double()
            logp = logits.log_softmax(-1)
            sums.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        good = math.exp(sums[0]) / (math.exp(sums[0]) + math.exp(sums[1]))
        assert opinion.verdict == ("good" if good > 0.5 else "flawed")
        assert opinion.confidence == pytest.approx(abs(2 * good - 1), abs=1e-4)
        assert opinion.tokens >= len(prompt)


def test_local_judge_asks_less_at_once_when_memory_is_short(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.save(tmp_path / "judge")
    settings = JudgeConfig(model=str(tmp_path / "judge"))
    judge = LocalJudge(settings, PolicyConfig(device="cpu"), budget=10**6)
    expected = judge.ask(TEXTS, lambda: None)
    sizes = []

    def scarce(model: Policy, rows: list[Row], **options: Any) -> Targets:
        sizes.append(distinct_tokens(rows))
        if sizes[-1] > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return score(model, rows, **options)

    limit = judge_tokens = distinct_tokens_of(judge, TEXTS[:1])
    monkeypatch.setattr(opinions, "score", scarce)
    found = judge.ask(TEXTS, lambda: None)
    assert [o.verdict for o in found] == [o.verdict for o in expected]
    assert [o.confidence for o in found] == pytest.approx(
        [o.confidence for o in expected], abs=1e-5
    )
    assert max(sizes) > judge_tokens >= min(sizes)
    limit = 3
    with pytest.raises(
        UntwineError, match="does not fit into the memory of the GPU beside the pol"
    ):
        judge.ask(TEXTS, lambda: None)


def distinct_tokens_of(judge: LocalJudge, texts: list[str]) -> int:
    prompts = [judge._model.chat.opening(JUDGE_SYSTEM, text) for text in texts]
    return max(map(len, prompts)) + 16


def test_local_judge_abstains_from_what_it_has_no_positions_for(
    policy: Policy, tmp_path: Path
) -> None:
    policy.save(tmp_path / "judge")
    judge = LocalJudge(
        JudgeConfig(model=str(tmp_path / "judge")), PolicyConfig(device="cpu"), budget=10**6
    )
    long = "word " * (policy.max_positions + 10)
    found = judge.ask([TEXTS[0], long, TEXTS[1]], lambda: None)
    alone = judge.ask([TEXTS[0], TEXTS[1]], lambda: None)
    assert [found[0], found[2]] == alone
    assert (found[1].how, found[1].verdict, found[1].tokens) == ("skipped", None, 0)
    assert "longer than the" in found[1].reason


def test_a_judge_of_random_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="random weights, which judge by chance"):
        LocalJudge(JudgeConfig(model="tiny"), PolicyConfig(device="cpu"), 100)


def test_local_judge_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        LocalJudge(JudgeConfig(model=str(tmp_path / "none")), PolicyConfig(), 100)
