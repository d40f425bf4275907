"""Ours beside its peers, beside another version of itself, and beside what the machine can do."""
