"""The experiments of the paper and of its reviewers, a page each. `results/` is what they made."""
