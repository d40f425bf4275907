"""The experiments of the paper and of its reviewers, one page each. Their output is in `results/`."""
