"""The theory lab: exact small models of why a flawed action survives training.

`calibration` asks whether outcome reward misjudges a flawed action, `squeezing` whether correcting
one flawed action feeds another, `regions` when the push from other states beats the correction.
Each has closed forms where they exist, the exact gradient flow, and sampled GRPO beside it. Only
numpy is needed; nothing here knows policies, environments or training.
"""
