"""Tree attention against dense attention with the mask of the paths, and what it leaves alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForCausalLM

from tests.policy.tries import reads, sequences
from untwine.config import PolicyConfig, SamplingConfig
from untwine.errors import ModelError
from untwine.policy import tree_attention
from untwine.policy.attention import NAME, packed_hidden_states
from untwine.policy.loading import Policy, load_policy
from untwine.policy.sampler import Sampler
from untwine.policy.tree_attention import (
    TreePlan,
    compile_twice_differentiable,
    flash_tree,
    flex_tree,
)
from untwine.policy.trie import PackedTrie, build_trie
from untwine.prompting.chat import Chat

CPU = torch.device("cpu")


def operands(N: int, dtype: torch.dtype, H: int = 6, K: int = 2, D: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(N)
    shapes = ((1, H, N, D), (1, K, N, D), (1, K, N, D))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def dense(qkv: list[torch.Tensor], trie: PackedTrie, scale: float) -> torch.Tensor:
    """Softmax over the keys that each token reads, in double precision."""
    q, k, v = (x.double() for x in qkv)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~torch.from_numpy(reads(trie)), -torch.inf)
    return (scores.softmax(-1) @ v)[0].transpose(0, 1)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@settings(deadline=None)
@given(
    sequences(),
    st.sampled_from(["trie", "separate"]),
    st.sampled_from([(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]),
    st.sampled_from([(6, 2), (4, 4), (3, 1)]),
)
def test_results_and_gradients_are_those_of_dense_attention(
    rows: list[np.ndarray], layout: Any, kind: tuple[torch.dtype, float], heads: tuple[int, int]
) -> None:
    dtype, tolerance = kind
    trie = build_trie(rows, layout)
    qkv = operands(trie.size, dtype, *heads)
    out, wanted = flash_tree(*qkv, TreePlan(trie, CPU), 0.3), dense(qkv, trie, 0.3)
    assert out.dtype == dtype
    assert gap(out, wanted) < tolerance
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(out, qkv, weight)
    reference = torch.autograd.grad(wanted, qkv, weight.double())
    for a, b in zip(got, reference, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * (1 + b.double().norm())


@settings(deadline=None)
@given(
    sequences(longest=40),
    st.sampled_from(["trie", "separate"]),
    st.sampled_from([(torch.float64, 1e-13), (torch.float32, 2e-6)]),
    st.data(),
)
def test_wanted_tokens_alone_get_what_they_get_among_all(
    rows: list[np.ndarray], layout: Any, kind: tuple[torch.dtype, float], data: st.DataObject
) -> None:
    dtype, tolerance = kind
    trie = build_trie(rows, layout)
    chosen = data.draw(st.sets(st.integers(0, trie.size - 1), min_size=1))
    wanted_U = np.array(sorted(chosen))
    query, key, value = operands(trie.size, dtype)
    asking = query.detach()[:, :, wanted_U].requires_grad_()
    plan = TreePlan(trie, CPU, wanted_U)
    out = flash_tree(asking, key, value, plan, 0.3)
    reference = dense([query, key, value], trie, 0.3)[wanted_U]
    assert gap(out, reference) < tolerance
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(out, [asking, key, value], weight)
    of_query, *others = torch.autograd.grad(reference, [query, key, value], weight.double())
    for a, b in zip(got, [of_query[:, :, wanted_U], *others], strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * (1 + b.double().norm())


def test_short_chains_are_batched_and_padding_changes_nothing() -> None:
    rows = [np.array([1, *[k] * n]) for k, n in enumerate([40, 39, 33, 31, 7, 6, 300], start=2)]
    trie = build_trie(rows, "trie")
    plan = TreePlan(trie, CPU)
    assert len(plan.layout.buckets) == 2
    assert len(plan.layout.chains) == 1
    assert any(len(bucket.queries.padding) for bucket in plan.layout.buckets)
    qkv = operands(trie.size, torch.float64)
    out, wanted = flash_tree(*qkv, plan, 0.3), dense(qkv, trie, 0.3)
    assert gap(out, wanted) < 1e-13
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), qkv),
        torch.autograd.grad(wanted.square().sum(), qkv),
        strict=True,
    ):
        assert gap(a, b) < 1e-13


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention with gradients, on the CPU. Not compiled it is plain PyTorch, whose gradients
    are right on any device; it refuses them on the CPU as it has no kernel for them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequences())
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_reads_and_learns_the_same(
    flex_on_cpu: None, rows: list[np.ndarray]
) -> None:
    trie = build_trie(rows, "trie")
    qkv = operands(trie.size, torch.float64)
    out, wanted = flex_tree(*qkv, TreePlan(trie, CPU), 0.3, compiled=False), dense(qkv, trie, 0.3)
    assert gap(out, wanted) < 1e-13
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), qkv),
        torch.autograd.grad(wanted.square().sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("lengths", [(300, 40, 260), (128, 128), (5,), (900, 1, 1, 130)])
def test_the_block_mask_is_the_one_that_looking_at_every_pair_gives(
    lengths: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(0)
    head = rng.integers(0, 9, 190)
    heads = [head[: int(rng.integers(0, 190))] for _ in lengths]
    rows = [
        np.concatenate([h, rng.integers(9, 99, n)]) for h, n in zip(heads, lengths, strict=True)
    ]
    plan = TreePlan(build_trie(rows, "trie"), CPU)
    mask = plan.block_mask
    every = create_block_mask(mask.mask_mod, None, None, plan.size, plan.size, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(every, name))
    assert torch.equal(mask.to_dense(), every.to_dense())
    counts, ours, theirs = mask.full_kv_num_blocks, mask.full_kv_indices, every.full_kv_indices
    for row in range(counts.shape[-1]):
        n = int(counts[0, 0, row])
        assert sorted(ours[0, 0, row, :n].tolist()) == sorted(theirs[0, 0, row, :n].tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("own", [1, 90, 900])
def test_on_cuda_results_and_gradients_are_those_of_dense_attention(group: int, own: int) -> None:
    """Short and long, one to eight query heads for each key head."""
    rng = np.random.default_rng(0)
    head = rng.integers(0, 9, 200)
    rows = [np.concatenate([head[:n], rng.integers(9, 20, own)]) for n in (own, min(own, 150), 9)]
    trie = build_trie(rows)
    made = operands(trie.size, torch.float32, H=2 * group, K=2, D=32)
    qkv = [x.detach().cuda().requires_grad_() for x in made]
    out = flex_tree(*qkv, TreePlan(trie, torch.device("cuda")), 0.3)
    local = [x.detach().cpu().requires_grad_() for x in qkv]
    wanted = dense(local, trie, 0.3)
    assert gap(out.cpu(), wanted) < 5e-3
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), qkv),
        torch.autograd.grad(wanted.square().sum(), local),
        strict=True,
    ):
        assert gap(a.cpu(), b) < 5e-3


@pytest.mark.slow
def test_a_compiled_function_has_two_backward_passes_of_one_graph() -> None:
    """As a verdict loss and the policy loss that share a forward pass need them. FlexAttention
    itself has no backward pass on a CPU."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ w, -1).pow(2).sum()

    before = torch._functorch.config.donated_buffer
    try:
        compiled = compile_twice_differentiable(function)
        x, w = (torch.randn(shape).requires_grad_() for shape in ((5, 7), (7, 9)))
        value = compiled(x, w)
        first = torch.autograd.grad(value, [x, w], retain_graph=True)
        second = torch.autograd.grad(value, [x, w])
    finally:
        torch._functorch.config.donated_buffer = before
    wanted = torch.autograd.grad(function(x, w), [x, w])
    for found in (first, second):
        torch.testing.assert_close(found, wanted)


def small_model(policy: Policy, implementation: str, family: str = "llama", **extra: Any) -> Any:
    config = AutoConfig.for_model(
        family,
        vocab_size=policy.vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **extra,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval()


def adopted(policy: Policy, model: Any) -> Policy:
    chat = Chat(policy.tokenizer)
    return Policy(model, policy.tokenizer, chat, CPU, torch.float32, "adopted")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_last_layer_runs_where_it_is_read(policy: Policy, family: str) -> None:
    """Hidden states and gradients of the wanted tokens are those of a pass over all, and the MLP of
    the last layer sees only them; families that are not known keep their own last layer."""
    extra = {"sliding_window": None} if family == "mistral" else {}
    ours = adopted(policy, small_model(policy, "sdpa", family, **extra).double())
    trie = build_trie([np.array(b) for b in BRANCHES], "trie")
    wanted = np.array([1, 4, trie.size - 1])
    seen: list[int] = []
    mlp = ours.model.base_model.layers[-1].mlp
    mlp.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
    found = []
    for hidden in (ours.hidden_states_along(trie, wanted), ours.hidden_states_along(trie)[wanted]):
        ours.model.zero_grad()
        hidden.square().sum().backward()
        found.append([hidden, *(p.grad.clone() for p in ours.model.base_model.parameters())])
    assert seen == [trie.size if family == "gemma" else len(wanted), trie.size]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_where_attention_needs_all_queries_the_rest_is_left_out(policy: Policy) -> None:
    """As with FlexAttention: attention over all tokens, all after it over the wanted ones."""
    ours = adopted(policy, small_model(policy, "sdpa").double())
    trie = build_trie([np.array(b) for b in BRANCHES], "trie")
    wanted = np.array([1, 4, trie.size - 1])
    plan = TreePlan(trie, CPU, wanted)
    plan.all_queries = True
    base = ours.model.base_model
    found = packed_hidden_states(base, trie.tokens_N, trie.depth_N, plan, CPU)
    torch.testing.assert_close(
        found, ours.hidden_states_along(trie)[wanted], atol=1e-12, rtol=1e-10
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_way_of_cuda_gives_the_gradients_of_separate_passes(
    policy: Policy, family: str, flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole pass of a model as on CUDA, but for the compiled kernel: FlexAttention over all
    queries, what comes after it for the wanted tokens only."""
    calls = []

    def without_kernel(*args: Any) -> torch.Tensor:
        calls.append(args)
        return flex_tree(*args, compiled=False)

    monkeypatch.setattr(tree_attention, "flash_tree", without_kernel)
    ours = adopted(policy, small_model(policy, "sdpa", family).double())
    plain = small_model(policy, "sdpa", family).double()
    trie = build_trie([np.array(b) for b in BRANCHES], "trie")
    wanted = np.unique(np.concatenate([path[-2:] for path in trie.paths]))
    plan = TreePlan(trie, CPU, wanted)
    plan.all_queries = True
    base = ours.model.base_model
    found = packed_hidden_states(base, trie.tokens_N, trie.depth_N, plan, CPU)
    found.square().sum().backward()
    assert len(calls) == 2
    rows: dict[int, torch.Tensor] = {}
    for branch, path in zip(BRANCHES, trie.paths, strict=True):
        alone = plain.base_model(input_ids=torch.tensor([branch]), use_cache=False)
        rows |= dict(zip(path.tolist(), alone.last_hidden_state[0], strict=True))
    theirs = torch.stack([rows[node] for node in wanted.tolist()])
    assert gap(found, theirs) < 1e-6
    theirs.square().sum().backward()  # type: ignore[no-untyped-call]
    for a, b in zip(base.parameters(), plain.base_model.parameters(), strict=True):
        assert gap(a.grad, b.grad) < 1e-6  # norms compute in float32 whatever the model does


BRANCHES = [[5, 6, 7, 8, 9], [5, 6, 7, 20, 21, 22], [5, 6], [30, 31]]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_repeating_positions_are_not_mistaken_for_packed_rows(
    policy: Policy, implementation: str
) -> None:
    """Without a plan, transformers takes the falling positions of a trie for packed sequences."""
    ours = adopted(policy, small_model(policy, implementation))
    trie = build_trie([np.array(b) for b in BRANCHES], "trie")
    got = ours.project(ours.hidden_states_along(trie))
    ids, depth = torch.from_numpy(trie.tokens_N)[None], torch.from_numpy(trie.depth_N)[None]
    guessed = ours.model(input_ids=ids, position_ids=depth, use_cache=False).logits[0]
    wrong = 0.0
    for branch, path in zip(BRANCHES, trie.paths, strict=True):
        alone = ours.model(input_ids=torch.tensor([branch]), use_cache=False).logits[0]
        torch.testing.assert_close(got[path], alone, atol=1e-5, rtol=1e-5)
        wrong = max(wrong, float((guessed[path] - alone).abs().max()))
    assert wrong > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_calls_without_a_plan_keep_their_masks(policy: Policy, implementation: str) -> None:
    """A registered attention function gets no mask unless it says which; and a boolean 4D mask is
    right for SDPA but silently wrong for eager attention, whatever the model was loaded with."""
    plain = small_model(policy, "sdpa")
    ours = adopted(policy, small_model(policy, implementation)).model
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    blocks = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(5, 5).tril()).bool()
    for mask in (None, padded, blocks[None, None].expand(2, 1, 9, 9)):
        got = ours(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wanted = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got[:, 3:], wanted[:, 3:], atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": padded}
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


@torch.no_grad()
def test_two_threads_do_not_disturb_each_other(policy: Policy) -> None:
    tries = [
        build_trie([np.array(b) for b in branches], "trie") for branches in (BRANCHES, BRANCHES[1:])
    ]
    alone = [policy.hidden_states_along(trie) for trie in tries]
    greedy = Sampler(policy, SamplingConfig(max_new_tokens=6), torch.Generator(), greedy=True)
    drawn = greedy.sample({0: [5, 6, 7]})[0].ids
    wrong: list[str] = []

    def work(k: int) -> None:
        for _ in range(20):
            if k == 2:
                again = Sampler(policy, greedy.config, torch.Generator(), greedy=True)
                if again.sample({0: [5, 6, 7]})[0].ids != drawn:
                    wrong.append("sampler")
            elif not torch.equal(policy.hidden_states_along(tries[k]), alone[k]):
                wrong.append(f"trie {k}")

    with ThreadPoolExecutor(3) as threads:
        for _ in threads.map(work, range(3)):  # raises what a thread raised
            pass
    assert wrong == []


@torch.no_grad()
def test_a_sequence_beyond_the_sliding_window_is_refused(policy: Policy) -> None:
    ours = adopted(policy, small_model(policy, "sdpa", "mistral", sliding_window=6))
    trie = build_trie([np.array([5, 6, 7, 8, 9, 10]), np.array([5, 6, 9])], "trie")
    got = ours.project(ours.hidden_states_along(trie))[trie.paths[0][-1]]
    alone = ours.model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, -1]
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="sliding window of 6"):
        ours.hidden_states_along(build_trie([np.arange(5, 12)]))


def test_the_way_of_attending_is_not_written_to_folders(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert load_policy(PolicyConfig(model=str(tmp_path)), tuple).parameters == policy.parameters
