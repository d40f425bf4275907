"""Studies of the library itself, a page each. `results/` is what they made."""
