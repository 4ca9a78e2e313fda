"""What is learnt: cold start, credit, loss, iterations; what is measured and kept on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from untwine.config.base import Fraction, Natural, Positive, Rate, Section
from untwine.envs.protocol import ExpertKind
from untwine.records import Verdict

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a running mean."""


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonal steps for the matrices of the layers, else AdamW"
    )
    lr: float = Field(3e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
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
    threads: Natural = Field(
        0, description="CPU threads of the cold start, where it runs alone; 0: policy.threads"
    )
    batch_tokens: Positive = Field(4096, description="tokens per optimizer step")
    lessons: list[LessonConfig] = Field(
        default_factory=list, description="what the first steps imitate; then everything"
    )
    balance: Fraction = Field(
        0.0,
        description="how much more rare kinds of commands weigh than frequent ones: 0 not at all, "
        "1 so much that all kinds weigh the same",
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
    expert: ExpertKind = Field(
        "oracle",
        description="who is imitated: it knows everything, or what it has read, and looks for the "
        "rest at random (search) or in order (systematic)",
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
    veto: list[Verdict] = Field(
        default_factory=list,
        description="labels that no advantage may contradict: flawed steps get at most 0, good "
        "ones at least 0",
    )


class LossConfig(Section):
    """Clipped surrogate, with KL penalty and entropy bonus as options."""

    clip_low: Fraction = 0.2
    clip_high: Rate = 0.2
    kl: Rate = Field(0.0, description="weight of the k3 estimate of KL to the initial policy")
    entropy: Rate = Field(0.0, description="weight of the entropy bonus")
    mean: Literal["token", "step", "episode"] = Field("token", description="unit of the loss mean")


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
    temperature: float | None = Field(
        None, gt=0, description="of the sampling; null: that of `sampling`"
    )


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
