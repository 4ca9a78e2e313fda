"""Recipes: one YAML file per experiment, checked before anything is loaded.

A recipe is a tree of sections (`env`, `prompt`, `policy`, ...). Every key has a type, a default and
a sentence of description; unknown keys are refused with the nearest known one. `load_recipe` also
takes overrides in the form `section.key=value`, whose values are read as YAML.
"""

from __future__ import annotations

from untwine.config.acting import (
    EnvConfig,
    LoRAConfig,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
    TinyConfig,
)
from untwine.config.base import Section
from untwine.config.gcd import BranchConfig, GCDConfig, JudgeConfig, ScheduleConfig
from untwine.config.learning import (
    CheckpointConfig,
    ColdStartConfig,
    CorrectionConfig,
    CreditConfig,
    DiagnoseConfig,
    EvaluateConfig,
    LessonConfig,
    LossConfig,
    OptimizerConfig,
    RLConfig,
)
from untwine.config.recipe import Recipe, lists_commands, load_recipe, make_recipe

__all__ = [
    "BranchConfig",
    "CheckpointConfig",
    "ColdStartConfig",
    "CorrectionConfig",
    "CreditConfig",
    "DiagnoseConfig",
    "EnvConfig",
    "EvaluateConfig",
    "GCDConfig",
    "JudgeConfig",
    "LessonConfig",
    "LoRAConfig",
    "LossConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PromptConfig",
    "RLConfig",
    "Recipe",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "TinyConfig",
    "lists_commands",
    "load_recipe",
    "make_recipe",
]
