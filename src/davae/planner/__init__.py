"""The cost of an upgrade, computed without weights: tokens, operations, memory, hours."""
