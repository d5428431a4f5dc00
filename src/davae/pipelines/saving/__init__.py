"""Saved pipelines and adapters: writing, opening, model cards and licences."""
