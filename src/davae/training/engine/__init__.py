"""Modules with their optimizers, on one device or sharded."""
