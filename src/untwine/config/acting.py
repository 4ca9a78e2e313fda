"""What acts: environment, prompt, policy, sampling."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from untwine.config.base import Natural, Positive, Section


class EnvConfig(Section):
    """Where the agent acts."""

    name: str = Field(
        "alfworld", description="environment family, see `untwine doctor`, or module:attribute"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the family")
    tasks: list[str] = Field(default_factory=list, description="task names; empty means all")
    splits: str = Field("default", description="split file: a name in the family, or a path")
    held_out_tasks: list[str] | None = Field(
        None, description="tasks kept out of training, with splits: default; null: the file's"
    )
    train_set: str = Field("train", description="which set of the split file to train on")
    variations: Natural = Field(0, description="first N variations of every task; 0 means all")
    max_steps: Positive = Field(20, description="step limit of an episode")
    workers: Natural = Field(0, description="worker processes; 0 runs in this process")
    sessions: Positive = Field(16, description="episodes that one worker holds at once")
    timeout_s: float = Field(
        60.0, gt=0, le=86_400, description="seconds before a silent worker is replaced"
    )


class PromptConfig(Section):
    """How a state becomes tokens."""

    layout: Literal["append", "window"] = Field(
        "append", description="a growing chat, or the last `history` steps"
    )
    history: Natural = Field(2, description="past (observation, action) pairs shown by `window`")
    tried: bool = Field(
        False, description="`window` lists the commands given so far, each once, before these pairs"
    )
    beginning: bool = Field(
        False, description="`window` shows the first observation of the episode, too, right away"
    )
    thoughts: bool = Field(False, description="let the model think before it acts")
    tags: bool = Field(False, description="let the model say what a step is for, in one of 4 tags")
    task: Literal["start", "end", "both"] = Field(
        "start",
        description="where a prompt states the task: first, or at the end of every question",
    )
    verb_last: bool = Field(
        False, description="replies say the first word of a command last: the thing, then the deed"
    )
    verdict: Literal["apart", "after"] = Field(
        "apart",
        description="a verdict question is a prompt of its own, or follows the reply it is about",
    )
    list_admissible: bool = Field(False, description="list the admissible commands in the prompt")
    only_admissible: bool = Field(False, description="refuse commands outside the admissible list")
    instructions: str = Field(
        "", description="said to the agent first: rules of the environment, worked examples"
    )
    max_tokens: Positive = Field(
        4096, description="longest prompt; an episode that outgrows it ends"
    )

    @model_validator(mode="after")
    def _only_windows_forget(self) -> PromptConfig:
        if self.tried and self.layout == "append":
            raise ValueError("tried is for layout: window; a growing chat holds every command")
        if self.beginning and self.layout == "append":
            raise ValueError("beginning is for layout: window; a growing chat holds everything")
        return self

    @property
    def reasons(self) -> bool:
        """Whether something comes before the command, which then stands in `<action>` tags."""
        return self.thoughts or self.tags


class TinyConfig(Section):
    """The `tiny` preset: a Llama built from scratch with a BPE tokenizer of its own."""

    hidden_size: Positive = 192
    layers: Positive = 4
    heads: Positive = 6
    kv_heads: Positive = 3
    head_dim: Natural = Field(0, description="width of a head; 0: hidden_size / heads")
    intermediate_size: Positive = 512
    vocab_size: Positive = Field(2048, description="BPE vocabulary, special tokens included")
    positions: Positive = Field(4096, description="longest context")
    init: Literal["normal", "mimetic"] = Field(
        "normal", description="weights at the start; mimetic: attention looks for its own token"
    )

    @model_validator(mode="after")
    def _divisible(self) -> TinyConfig:
        if self.heads % self.kv_heads or (not self.head_dim and self.hidden_size % self.heads):
            raise ValueError("hidden_size must be a multiple of heads, and heads of kv_heads")
        if (self.head_dim or self.hidden_size // self.heads) % 2:
            raise ValueError("the width of a head (hidden_size / heads) must be even")
        if self.init == "mimetic" and self.heads != self.kv_heads:
            raise ValueError("init: mimetic needs as many kv_heads as heads")
        return self


class LoRAConfig(Section):
    """Low-rank adapters instead of full weights."""

    rank: Natural = Field(0, description="rank of the adapters; 0 trains all weights")
    alpha: Positive = Field(32, description="adapters are scaled by alpha / rank")
    freeze: bool = Field(True, description="train the adapters only, not the weights beside them")
    target_modules: list[str] = Field(
        default_factory=lambda: [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        description="linear layers that get an adapter, by the last part of their name",
    )


class PolicyConfig(Section):
    """The language model that acts."""

    model: str = Field("tiny", description="preset (tiny, smollm2), Hugging Face id, or folder")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="computation type; weights stay in float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    threads: Natural = Field(0, description="torch threads; 0 keeps the default")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    lora: LoRAConfig = LoRAConfig()
    tiny: TinyConfig = TinyConfig()


class SamplingConfig(Section):
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1.0)
    max_new_tokens: Positive = 24
    constrained: bool = Field(
        False,
        description="choose among the admissible commands only, token by token; thoughts and tags "
        "before the command stay free",
    )
    waves: Natural = Field(
        0, description="parts of the slots that act in turn, with workers; 0: 2 for slow ones"
    )
