"""The model in plain Python integers: cases, the contract's oracle, verdicts. No torch, no Triton, no Hypothesis."""
