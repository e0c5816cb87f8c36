"""Types of string options. Imports nothing, so that the command line lists choices without importing torch."""

from __future__ import annotations

from typing import Literal

Tail = Literal["resample", "fixed"]
Memory = Literal["auto", "fast", "min"]
FusedMemory = Literal["fast", "balanced", "min"]
Trainable = Literal["upper", "as_is"]
AttentionName = Literal["sdpa", "xformers"]
SamplerKind = Literal["class_pure", "random", "balanced", "sequential"]
ClassWeight = Literal["balanced"] | float
HeadName = Literal["none", "anchored", "gaussian", "probe"]
HeadChoice = Literal[HeadName, "auto"]
Prior = Literal["images", "balanced"]
Refresh = Literal["never", "epoch"]
CacheDtype = Literal["fp32", "fp16", "bf16", "int8"]
Protocol = Literal["base-to-new", "cross-dataset", "domain-generalization", "few-shot"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Preset = Literal["default", "reference"]
Shots = int | Literal["all"]
Validation = Literal["auto", "none", "split"] | float
Test = Literal["split", "none"]
OptimizerName = Literal["sgd", "adamw"]
