"""What an upgrade costs, computed without weights: tokens, operations, memory, hours."""
