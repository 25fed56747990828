"""Who is slow, why, and whether moving lanes pays. Pure: no clock, no randomness, no I/O; NumPy only for its arrays."""
