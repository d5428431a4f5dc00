"""Inception Score (Salimans et al. 2016): high if each image has a clear class and all classes occur."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from davae.errors import DavaeError


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the parts, between 1 and the number of classes."""

    mean: float
    std: float


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """``exp(mean_x KL(p(y|x) | p(y)))``, over equal parts of the shuffled images.

    Args:
        logits: ``[N, K]`` before the softmax; log-probabilities work as well.
        splits: parts; 10 is the published choice. The score grows with the size of a part.
        seed: of the shuffle, as torch-fidelity's.

    Raises:
        DavaeError: fewer images than parts.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise DavaeError(f"{splits} parts need as many rows of class logits [N, K], got {list(logits.shape)}")
    random = np.random.RandomState(seed)  # as torch-fidelity draws
    shuffled = logits.double().cpu()[torch.from_numpy(random.permutation(len(logits)))]
    logs = shuffled.log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = logs[i * len(logs) // splits : (i + 1) * len(logs) // splits]
        marginal = part.logsumexp(dim=0) - np.log(len(part))  # log p(y); no class underflows
        scores.append(float(_kl(part, marginal).sum(dim=1).mean().exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _kl(logs: Tensor, marginal: Tensor) -> Tensor:
    """``p (log p - log q)``, 0 where p is 0: logarithms of probabilities may be minus infinity."""
    return torch.where(logs.isinf(), 0.0, logs.exp() * (logs - marginal))
