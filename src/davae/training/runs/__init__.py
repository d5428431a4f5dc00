"""What the verbs around trainings do, callable from a script."""
