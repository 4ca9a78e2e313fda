"""The microscope: why a flawed action survives training. Works on any Hugging Face causal LM."""
