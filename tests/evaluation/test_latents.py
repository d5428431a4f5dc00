import pytest
import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation import (
    PrincipalAxes,
    linear_probe,
    linear_probe_accuracy,
    nearest_neighbour_accuracy,
    project_latents,
)
from davae.evaluation.latent_space.separability import ridge_accuracies


def _clusters(spread: float, count: int = 30, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 4, 3, 3, generator=generator)
    labels = torch.arange(classes).repeat_interleave(count)
    return centres[labels] + spread * torch.randn(len(labels), 4, 3, 3, generator=generator), labels


def test_pca_recovers_known_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q[:2]
    coordinates = torch.randn(400, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    found = PrincipalAxes.fit(coordinates @ axes + 5.0, 2)
    cosine = (found.axes * axes).sum(1).abs()
    assert cosine.min() > 0.995
    torch.testing.assert_close(found.explained.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert found.explained[0] == pytest.approx(0.9, abs=0.02)
    gram = found.axes @ found.axes.T
    torch.testing.assert_close(gram, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mean, (coordinates @ axes + 5).mean(0))


def test_projection_is_centred_and_its_sign_is_settled() -> None:
    latents, _ = _clusters(0.1)
    first = project_latents(latents)
    assert first.shape == (120, 2)
    assert first.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(project_latents(latents.flip(0)).flip(0), first, rtol=0, atol=1e-4)


def test_tsne_keeps_clusters_together() -> None:
    latents, labels = _clusters(0.05)
    plane = project_latents(latents, "tsne")
    assert plane.shape == (120, 2)
    assert nearest_neighbour_accuracy(plane, labels) == 1.0
    centres = torch.stack([plane[labels == i].mean(0) for i in range(4)])
    within = max(float((plane[labels == i] - centres[i]).norm(dim=1).mean()) for i in range(4))
    between = float(torch.nn.functional.pdist(centres).min())
    assert between > 3 * within
    assert torch.equal(project_latents(latents, "tsne"), plane)


def test_separable_classes_are_found_and_noise_is_not() -> None:
    latents, labels = _clusters(0.3)
    assert linear_probe_accuracy(latents, labels) == 1.0
    assert nearest_neighbour_accuracy(latents, labels) == 1.0
    noise = torch.randn(400, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    chance = torch.arange(4).repeat(100)
    assert 0.1 < linear_probe_accuracy(noise, chance) < 0.4
    assert 0.1 < nearest_neighbour_accuracy(noise, chance) < 0.4


def test_probe_is_the_same_by_either_gram_matrix() -> None:
    # Constant features carry nothing, so padding with them must not change a prediction.
    latents, labels = _clusters(2.5, count=20)
    rows = latents.flatten(1)  # 36 features, 40 latents to fit: solved one way
    wide = torch.cat([rows, torch.zeros(len(rows), 60)], 1)  # 96 features: the other way
    narrow_accuracy = linear_probe_accuracy(rows, labels)
    assert 0.3 < narrow_accuracy < 1
    assert linear_probe_accuracy(wide, labels) == narrow_accuracy


def test_a_probe_chooses_the_regularisation_that_a_part_needs() -> None:
    # As many features as latents to fit: without regularisation the solution follows the noise.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(30)
    centres = 0.4 * torch.randn(4, 60, generator=generator)
    latents = centres[labels] + torch.randn(120, 60, generator=generator)
    weak = linear_probe(latents, labels, strengths=(1e-6,))
    chosen = linear_probe(latents, labels)
    assert chosen.mean > weak.mean + 0.2
    assert chosen == linear_probe(latents, labels)
    shuffled = linear_probe(latents, labels[torch.randperm(120, generator=generator)])
    assert shuffled.mean == pytest.approx(0.25, abs=0.12)


def test_a_probe_is_the_ridge_solution() -> None:
    latents, labels = _clusters(2.5, count=20)
    rows = latents.flatten(1).double()
    train = torch.arange(80) % 2 == 0
    x = (rows - rows[train].mean(0)) / rows[train].std(0, correction=0)
    y = torch.nn.functional.one_hot(labels).double()
    prior = y[train].mean(0)
    gram = x[train].T @ x[train] + 0.3 * 40 * torch.eye(36, dtype=torch.float64)
    weight = torch.linalg.solve(gram, x[train].T @ (y[train] - prior))
    right = (x[~train] @ weight + prior).argmax(1) == labels[~train]
    assert ridge_accuracies(rows, labels, 4, train, [0.3]) == [float(right.double().mean())]


def test_nearest_neighbours_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [4.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    # The last one is nearest to 1 (class 0); all others sit beside their own kind.
    assert nearest_neighbour_accuracy(points, labels, neighbours=1) == pytest.approx(0.8)


def test_mistakes_are_named() -> None:
    latents, labels = _clusters(0.1)
    with pytest.raises(DavaeError, match="'pca' or 'tsne'"):
        project_latents(latents, "umap")  # type: ignore[arg-type]
    with pytest.raises(DavaeError, match="NaN"):
        project_latents(latents * float("nan"))
    with pytest.raises(DavaeError, match="one label a latent"):
        linear_probe_accuracy(latents, labels[:-1])
    with pytest.raises(DavaeError, match="two classes"):
        linear_probe_accuracy(latents, labels * 0)
