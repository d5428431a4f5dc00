"""A process's draws are its rows of the draws that one process would make for the whole batch."""

import pytest
import torch
from diffusers.models.embeddings import LabelEmbedding
from tests.end_to_end.families import stage
from torch.overrides import _get_current_function_mode_stack

from davae.bases.debug_pipelines import SMALL_PIPELINES
from davae.bases.tiny import debug_base
from davae.data import collate
from davae.models import AutoencoderDA
from davae.recipes.read import load_recipe
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.autoencoder.plain_objective import plain_modules
from davae.training.loop.rng import RankInvariantDraws, drawing, draws_by

DRAWS = [
    lambda n: torch.randn(n, 3),
    lambda n: torch.randn((n, 3), dtype=torch.float64),
    lambda n: torch.randn(size=(n, 3)),
    lambda n: torch.rand(n),
    lambda n: torch.randn_like(torch.zeros(n, 2, 2)),
    lambda n: torch.rand_like(torch.zeros(n, 2)),
    lambda n: torch.randint(7, (n,)),
    lambda n: torch.randint(3, 9, (n, 2)),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_of_two_processes_are_the_whole_batch(draw):
    torch.manual_seed(0)
    whole = [draw(8), draw(8)]
    parts = []
    for rank in range(2):
        torch.manual_seed(0)
        with RankInvariantDraws(rank, 2, 4):
            parts.append([draw(4), draw(4)])
    for i in range(2):
        assert torch.equal(torch.cat([parts[0][i], parts[1][i]]), whole[i])


def test_other_draws_are_left_alone():
    with RankInvariantDraws(1, 2, 4):
        torch.manual_seed(0)
        inside = torch.randn(5, 2), torch.randn(4, generator=torch.Generator().manual_seed(1)), torch.zeros(4)
    torch.manual_seed(0)
    outside = torch.randn(5, 2), torch.randn(4, generator=torch.Generator().manual_seed(1)), torch.zeros(4)
    for a, b in zip(inside, outside):
        assert torch.equal(a, b)


def test_an_objective_draws_as_the_loop_has_set_and_else_as_torch_does():
    def drawn():
        torch.manual_seed(0)
        with drawing():
            return torch.rand(2)

    with draws_by(RankInvariantDraws(1, 2, 2)):
        second = drawn()
        with draws_by(None):
            assert torch.equal(drawn(), drawn())
            first = drawn()
    torch.manual_seed(0)
    assert torch.equal(torch.cat([first, second]), torch.rand(4))


def _diffusion(name):
    made = stage(name)
    batch = collate([made.dataset[i] for i in range(2)])
    return made.objective, {k: v for k, v in batch.items() if k != "skipped"}


def _upgraded():
    recipe = load_recipe("debug").autoencoder
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8, detail_dropout=0.5)
    return StructuredObjective(vae, recipe.alignment, recipe.reconstruction), {"image": torch.zeros(2, 3, 32, 32)}


def _plain():
    recipe, vae = load_recipe("debug").autoencoder, debug_base().vae
    return plain_modules(vae, [vae], recipe.reconstruction, recipe.optimizer)[0], {"image": torch.zeros(2, 3, 32, 32)}


OBJECTIVES = {"upgraded": _upgraded, "plain": _plain}


@pytest.mark.parametrize("name", [*OBJECTIVES, "debug", *SMALL_PIPELINES])
def test_no_layer_runs_under_a_function_mode_or_draws(name, monkeypatch):
    """It would be compiled for the mode, and recomputed without it, from other draws."""
    objective, batch = OBJECTIVES[name]() if name in OBJECTIVES else _diffusion(name)
    inside, drawn = [], []
    for module in objective.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_: inside.append(len(_get_current_function_mode_stack())))
    for draw in ("rand", "randn", "rand_like", "randn_like", "randint"):
        plain = getattr(torch, draw)

        def noted(*args, plain=plain, **options):
            drawn.append(len(_get_current_function_mode_stack()))
            return plain(*args, **options)

        monkeypatch.setattr(torch, draw, noted)
    with draws_by(RankInvariantDraws(1, 2, 2)):
        objective.train()(batch, 0)
    assert inside
    assert not any(inside)
    assert drawn
    assert all(drawn)


def test_a_dit_drops_a_label_in_all_blocks_or_in_none():
    objective, batch = _diffusion("dit")
    embeddings = [m for m in objective.modules() if isinstance(m, LabelEmbedding)]
    seen = []
    for embedding in embeddings:
        embedding.embedding_table.register_forward_pre_hook(lambda _, labels: seen.append(labels[0]))
    batch = {"latent": batch["latent"].repeat(8, 1, 1, 1), "label": torch.arange(16)}
    objective.train()(batch, 0)
    assert len(seen) > len(embeddings) > 1  # the output layer embeds the label once more
    dropped = seen[0] == 1000
    assert 0 < dropped.sum() < len(dropped)
    assert torch.equal(seen[0][~dropped], batch["label"][~dropped])
    assert all(torch.equal(labels, seen[0]) for labels in seen)
