"""Faults, injected for real: whole installations of real processes, and one checker of what came of them."""
