"""Recipes: one YAML file per experiment, checked before anything is loaded.

A recipe is a tree of sections (`env`, `prompt`, `policy`, ...). Every key has a type, a default and
a sentence of description; unknown keys are refused with the nearest known one. `load_recipe` also
takes overrides in the form `section.key=value`, whose values are read as YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from untwine.errors import ConfigError, nearest
from untwine.recipe_keys import all_keys, keys_below

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EnvConfig(Section):
    """Where the agent acts."""

    name: str = Field("alfworld", description="environment family, see `untwine doctor`")
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
    timeout_s: float = Field(60.0, gt=0, description="seconds before a silent worker is replaced")


class PromptConfig(Section):
    """How a state becomes tokens."""

    layout: Literal["append", "window"] = Field(
        "append", description="a growing chat, or the last `history` steps"
    )
    history: Natural = Field(2, description="past (observation, action) pairs shown by `window`")
    tried: bool = Field(
        False, description="`window` lists the commands given so far, each once, before these pairs"
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
        return self

    @model_validator(mode="after")
    def _bare_commands(self) -> PromptConfig:
        if self.verb_last and self.reasons:
            raise ValueError(
                "verb_last is for replies that are only a command, without thoughts or tags"
            )
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
        False, description="choose among the admissible commands only, token by token"
    )
    waves: Natural = Field(
        0, description="parts of the slots that act in turn, with workers; 0: 2 for slow ones"
    )


class OptimizerConfig(Section):
    lr: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: Rate = 0.0
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    warmup: Natural = Field(0, description="steps of linear warm-up")
    final: Fraction = Field(
        1.0, description="share of the rate that is left at the end, reached linearly"
    )


class LessonConfig(Section):
    """Steps of a cold start that imitate some kinds of commands only, each equally often."""

    steps: Positive
    commands: list[str] = Field(min_length=1, description="first words of what is imitated")


class ColdStartConfig(Section):
    """Imitation of expert episodes, mixed with verdict data."""

    episodes: Natural = Field(0, description="expert episodes; 0 skips the cold start")
    steps: Natural = Field(200, description="optimizer steps")
    batch_tokens: Positive = Field(4096, description="tokens per optimizer step")
    lessons: list[LessonConfig] = Field(
        default_factory=list, description="what the first steps imitate; then everything"
    )
    verdict_weight: Rate = Field(0.0, description="weight of the verdict loss; 0 leaves it out")
    verdict_share: Rate = Field(
        0.25, description="tokens of verdict data per token of imitation in each step"
    )
    objective: Literal["generative/ce", "pairwise"] = Field(
        "generative/ce", description="what the verdict data asks for"
    )
    alternatives: Natural = Field(
        0, description="commands beside each of the expert's that the verdict data asks about, too"
    )
    text_weight: Rate = Field(
        0.0, description="weight of predicting the environment's own text, for models from scratch"
    )
    expert: Literal["oracle", "search"] = Field(
        "oracle", description="who is imitated: it knows everything, or what it has read"
    )
    noise: Fraction = Field(
        0.0, description="chance that another command of the plan comes before an expert step"
    )
    imitate_noise: bool = Field(
        False, description="imitate those commands too, as from a demonstrator that errs"
    )
    instructed: Fraction = Field(
        0.0, description="share of episodes with a copy that is told not to do what it does not do"
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, warmup=20)

    @model_validator(mode="after")
    def _lessons_fit(self) -> ColdStartConfig:
        taught = sum(lesson.steps for lesson in self.lessons)
        if taught > self.steps:
            raise ValueError(f"lessons take {taught} steps, and steps says {self.steps}")
        return self


class CreditConfig(Section):
    name: str = Field("grpo", description="credit method")
    options: dict[str, Any] = Field(default_factory=dict)
    penalty: Rate = Field(
        0.0, description="taken from the advantage of steps that all their labels call flawed"
    )


class LossConfig(Section):
    """Clipped surrogate, with KL penalty and entropy bonus as options."""

    clip_low: Fraction = 0.2
    clip_high: Rate = 0.2
    kl: Rate = Field(0.0, description="weight of the k3 estimate of KL to the initial policy")
    entropy: Rate = Field(0.0, description="weight of the entropy bonus")
    mean: Literal["token", "step", "episode"] = Field("token", description="unit of the loss mean")


class ScheduleConfig(Section):
    """Weight over training: constant, or linear from `start` to `end` over all iterations."""

    kind: Literal["constant", "linear"] = "constant"
    start: Rate = 1.0
    end: Rate = 1.0

    def at(self, progress: float) -> float:
        """Factor at `progress` in [0, 1]."""
        if self.kind == "constant":
            return self.start
        return self.start + (self.end - self.start) * min(max(progress, 0.0), 1.0)


class BranchConfig(Section):
    """Labels of source `branch`: what playing on may cost in each iteration."""

    steps: Natural = Field(16, description="steps judged on line per iteration; 0 judges none")
    branches: int = Field(64, ge=2, description="pairs of branches per judged action, at most")
    delta: Fraction = Field(0.05, description="|A*| up to this is neutral")
    confidence: float = Field(0.95, ge=0.5, lt=1.0, description="of each interval")
    runs: list[str] = Field(
        default_factory=list, description="run directories whose truth files are used as well"
    )


class JudgeConfig(Section):
    """Labels of source `judge`: a language model behind an OpenAI-compatible endpoint, or a local
    one."""

    url: str = Field("", description="base URL of the endpoint; empty: a local model")
    model: str = Field("", description="name of the model there, or Hugging Face id or folder")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key, if one is needed"
    )
    timeout_s: float = Field(
        20.0, gt=0, allow_inf_nan=False, description="seconds for one answer, all of it"
    )
    retries: Natural = Field(2, description="further tries after a failure that may pass")
    at_once: Positive = Field(4, description="questions under way at the same time")
    questions: Natural = Field(64, description="questions per iteration, at most")
    token_budget: Natural = Field(
        1_000_000, description="tokens that may be spent on the answers in the cache"
    )
    cache: str = Field("", description="file of answers; empty: judge.jsonl in the run directory")
    history: Natural = Field(8, description="past (observation, command) pairs that are shown")
    logprobs: bool = Field(False, description="ask the endpoint how sure it is")
    confidence: float = Field(
        0.8, gt=0, le=1, description="of answers that come without log-probabilities"
    )


class GCDConfig(Section):
    """The actor also learns to tell good actions from bad ones."""

    objective: str = Field("none", description="none, or an objective of gcd/objectives")
    weight: Rate = Field(0.5, description="lambda")
    schedule: ScheduleConfig = ScheduleConfig()
    weight_of: Literal["loss", "gradient"] = Field(
        "loss", description="weight is lambda, or the ratio at which the gradient norms are held"
    )
    step: Literal["joint", "own"] = Field(
        "joint", description="one optimizer step for both losses, or one for each"
    )
    gradient: Literal["all", "layers", "lora"] = Field(
        "all", description="which weights the verdict loss changes"
    )
    from_layer: Natural = Field(0, description="with gradient: layers, the first such layer")
    labels: list[str] = Field(default_factory=lambda: ["rule", "group"])
    taught: list[str] = Field(
        default_factory=list,
        description="of the sources in labels, those that questions and the penalty go by; "
        "empty: all. The others are recorded only",
    )
    min_confidence: Fraction = 0.5
    shuffle_labels: bool = Field(
        False, description="a control: verdict questions get each other's labels, at random"
    )
    token_budget: Positive = Field(8192, description="verdict tokens per optimizer step, at most")
    replies: int = Field(8, ge=2, description="with an rl objective: replies to each question")
    rationale_tokens: Natural = Field(
        0, description="with an rl objective: longest reply; 0: one of the two words"
    )
    expert: Literal["oracle", "search"] = Field(
        "oracle", description="source expert: it knows everything, or what has been read"
    )
    branch: BranchConfig = BranchConfig()
    judge: JudgeConfig = JudgeConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> GCDConfig:
        if self.objective != "none" and not self.labels:
            raise ValueError("an objective needs labels; name at least one source, such as rule")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels names a source twice; name each once")
        if unknown := set(self.taught) - set(self.labels):
            raise ValueError(
                f"taught names {', '.join(sorted(unknown))}, which labels does not; add it there"
            )
        if self.step == "own" and self.weight_of == "gradient":
            raise ValueError(
                "an own step has nothing to hold a ratio to; set step: joint or weight_of: loss"
            )
        return self


class CorrectionConfig(Section):
    """Instructions against flawed actions of kinds that are frequent."""

    kinds: list[str] = Field(
        default_factory=list, description="kinds that may be told against; empty: none is"
    )
    above: Fraction = Field(0.1, description="share of steps from which an instruction is shown")
    below: Fraction = Field(0.05, description="share of steps below which it no longer is")
    window: Positive = Field(1, description="iterations over which the shares are taken")
    share: Fraction = Field(0.5, description="share of the groups that are told")
    anneal: Fraction = Field(
        0.0, description="part of the training in which that share falls to 0; 0: it stays"
    )
    sentences: dict[str, str] = Field(
        default_factory=dict, description="instructions by kind, instead of the package's"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> CorrectionConfig:
        if self.below > self.above:
            raise ValueError(
                f"below ({self.below:g}) is larger than above ({self.above:g}), so an instruction "
                "would go out as it comes in; lower below or raise above"
            )
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds names a kind twice; name each once")
        return self


class RLConfig(Section):
    iterations: Natural = 20
    groups: Positive = Field(8, description="task instances per iteration")
    group_size: Positive = Field(8, description="episodes per task instance (G)")
    variations: Natural = Field(
        0, description="first N variations of every task, of those of `env`; 0 means all"
    )
    token_budget: Natural = Field(
        0, description="tokens of updates, verdicts included, after which the iterations end"
    )
    epochs: Positive = Field(1, description="passes over each batch")
    minibatches: Positive = Field(1, description="optimizer steps per pass")
    microbatch_tokens: Positive = Field(16384, description="distinct tokens per forward pass")
    returns: Literal["outcome", "success"] = Field(
        "outcome", description="return of an episode: its outcome, or its success (0 or 1)"
    )
    drop_constant_groups: bool = Field(True, description="leave out groups without spread")
    optimizer: OptimizerConfig = OptimizerConfig()


class EvaluateConfig(Section):
    every: Natural = Field(0, description="iterations between evaluations; 0 only at the end")
    sets: list[str] = Field(
        default_factory=lambda: ["L0", "L1"], description="sets of the split file"
    )
    episodes: Natural = Field(64, description="episodes per set; 0 skips the evaluation")
    greedy: bool = Field(False, description="take the most likely token instead of sampling")


class DiagnoseConfig(Section):
    """Diagnosis during training."""

    every: Natural = Field(0, description="iterations between diagnoses; 0 makes none")
    probes: Natural = Field(16, description="probes of each kind, at most; 0 leaves them out")
    samples: Natural = Field(64, description="samples of the Gram, at most; 0 leaves it out")

    @model_validator(mode="after")
    def _pairs(self) -> DiagnoseConfig:
        if self.samples == 1:
            raise ValueError(
                "samples must be 2 or more, as coupling is between two; 0 leaves it out"
            )
        return self


class CheckpointConfig(Section):
    every: Positive = Field(1, description="iterations between checkpoints")
    cold_start_every: Positive = Field(100, description="cold-start steps between checkpoints")
    keep: Positive = Field(2, description="how many checkpoints to keep")


class Recipe(Section):
    """One experiment, as resolved."""

    name: str = "run"
    seed: int = 0
    env: EnvConfig = EnvConfig()
    prompt: PromptConfig = PromptConfig()
    policy: PolicyConfig = PolicyConfig()
    sampling: SamplingConfig = SamplingConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    rl: RLConfig = RLConfig()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    gcd: GCDConfig = GCDConfig()
    correction: CorrectionConfig = CorrectionConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _constrained_without_reasons(self) -> Recipe:
        if self.sampling.constrained and self.prompt.reasons:
            what = "thoughts" if self.prompt.thoughts else "tags"
            no_room = f"sampling.constrained leaves no room for {what}"
            raise ValueError(f"{no_room}; set one of it and prompt.{what} to false")
        return self

    @model_validator(mode="after")
    def _episodes_within_budget(self) -> Recipe:
        longest = self.prompt.max_tokens + self.sampling.max_new_tokens
        if longest > self.rl.microbatch_tokens:
            raise ValueError(
                f"a sequence may have {longest} tokens (prompt.max_tokens plus "
                f"sampling.max_new_tokens) and does not fit rl.microbatch_tokens="
                f"{self.rl.microbatch_tokens}; lower prompt.max_tokens or raise the budget"
            )
        return self

    @property
    def lists_commands(self) -> bool:
        """See the function of this name."""
        return lists_commands(self.prompt, self.sampling)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def lists_commands(prompt: PromptConfig, sampling: SamplingConfig) -> bool:
    """Whether every observation must come with the admissible commands."""
    return prompt.list_admissible or prompt.only_admissible or sampling.constrained


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises ConfigError with one sentence for anything that is wrong.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        kind = "a folder" if path.is_dir() else "missing"
        raise ConfigError(
            f"recipe {path} is {kind}; recipes are YAML files such as recipes/smoke.yaml"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise ConfigError(f"{path} is not valid YAML{where}: {problem}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as `env:`, not a {type(tree).__name__}")
    return make_recipe(tree, str(path), overrides)


def make_recipe(
    tree: dict[str, Any], source: str = "recipe", overrides: Sequence[str] = ()
) -> Recipe:
    """Check a tree of plain values, with overrides applied to it; `source` names it in errors."""
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {override!r} is not valid YAML") from error
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a section")
        node = child
    node[last] = value


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, word = [str(part) for part in problem["loc"]]
        hint = nearest(where, all_keys(Recipe)) or nearest(word, keys_below(Recipe, parents))
        return f"unknown key {where!r}.{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if not where:  # keys of several sections do not go together, and the message names them
        return message
    shown = repr(problem.get("input"))
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return f"{where}: {message[0].lower() + message[1:]} (got {shown})"
