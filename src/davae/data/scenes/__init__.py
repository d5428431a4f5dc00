"""The procedural data set: illustrations of twelve classes, rendered at any resolution from a seed."""

from davae.data.scenes.dataset import CLASSES, ProceduralScenes, SceneItem, render_scene

__all__ = ["CLASSES", "ProceduralScenes", "SceneItem", "render_scene"]
