"""What a projection means: pure functions over frozen calibrations. No I/O, no clock, no randomness."""
