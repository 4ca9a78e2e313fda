"""How the actor learns to tell good actions from bad ones, and where its labels come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from untwine.config.base import Fraction, Natural, Positive, Rate, Section

Contrast = Literal["random", "similar"]


class ScheduleConfig(Section):
    """Weight over training: constant, or linear from `start` to `end` over all iterations or, where
    that ends it sooner, all of `rl.token_budget`."""

    kind: Literal["constant", "linear"] = "constant"
    start: Rate = 1.0
    end: Rate = 1.0

    @model_validator(mode="after")
    def _fits_together(self) -> ScheduleConfig:
        if self.kind == "constant" and self.end != 1.0:
            raise ValueError(f"end: {self.end:g} is where a linear schedule ends; set kind: linear")
        return self

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
    confidence: float = Field(0.95, ge=0.5, le=0.9999, description="of each interval")
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

    objective: str = Field(
        "none", description="none, an objective of gcd/objectives, or module:maker"
    )
    weight: Rate = Field(0.5, description="lambda")
    schedule: ScheduleConfig = ScheduleConfig()
    weight_of: Literal["loss", "gradient"] = Field(
        "loss", description="weight is lambda, or the ratio at which the gradient norms are held"
    )
    norms_every: Positive = Field(
        1,
        description="with weight_of: gradient, steps from one measurement of the two norms to the "
        "next; between, what was found last holds, and one backward pass is enough",
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
    contrast: Contrast = Field(
        "random",
        description="which good action is asked about beside which flawed one (generative "
        "objectives and head): any, or the one most like it, so that the words of a command do not "
        "tell",
    )
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
        if self.from_layer and self.gradient != "layers":
            raise ValueError(
                f"from_layer: {self.from_layer} is for a gradient that enters some layers; set "
                "gradient: layers"
            )
        if self.contrast != "random" and self.objective in ("pairwise", "pairwise/rl"):
            raise ValueError(
                f"contrast: {self.contrast} is for questions about one action; those of "
                f"{self.objective} are about two"
            )
        if self.rationale_tokens and self.objective in ("generative/ce", "pairwise", "head"):
            raise ValueError(
                f"rationale_tokens: {self.rationale_tokens} is for replies that are sampled, as by "
                f"generative/rl; {self.objective} samples none"
            )
        if self.norms_every > 1 and self.weight_of == "loss":
            raise ValueError(
                f"norms_every: {self.norms_every} is for norms that are measured; set "
                "norms_every: 1 or weight_of: gradient"
            )
        if self.step == "own" and self.weight_of == "gradient":
            raise ValueError(
                "an own step has nothing to hold a ratio to; set step: joint or weight_of: loss"
            )
        return self
