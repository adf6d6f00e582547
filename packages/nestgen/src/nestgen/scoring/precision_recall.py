"""Fidelity and diversity by nearest neighbours: precision, recall, density and coverage."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048  # vectors whose distances to all others are held at a time
PR, DC = 3, 5  # neighbours that make a radius: Kynkäänniemi et al. 2019 (1904.06991), Naeem et al. 2020 (2002.09797)


def neighbour_radii(x_ND: Tensor, neighbours: tuple[int, ...] = (PR, DC)) -> tuple[Tensor, ...]:
    """Distance of each vector to its k-th nearest other one, (N), for each k; float64, more than k vectors."""
    parts = []
    for part_BD in x_ND.split(CHUNK):
        nearest_BK = torch.cdist(part_BD, x_ND).topk(max(neighbours) + 1, largest=False).values  # the first is itself
        parts.append(nearest_BK[:, list(neighbours)])
    return tuple(torch.cat(parts).T)


def precision_recall(
    x_ND: Tensor, real_MD: Tensor, real_radii: tuple[Tensor, ...] | None = None
) -> dict[str, float | None]:
    """Scores of samples x, each 1 for perfect ones but density, which may exceed it; None for too few vectors.

    precision  share of samples within the 3rd-neighbour ball of some real vector
    recall     share of real vectors within that ball of some sample
    density    mean number of real 5th-neighbour balls that a sample lies in, over 5
    coverage   share of real vectors whose own 5th-neighbour ball holds a sample

    `real_radii` is `neighbour_radii(real_MD)`, if it is at hand.
    """
    names = ("precision", "recall", "density", "coverage")
    if min(len(x_ND), len(real_MD)) <= DC:
        return dict.fromkeys(names)
    radius_PR_M, radius_DC_M = real_radii or neighbour_radii(real_MD)
    (radius_N,) = neighbour_radii(x_ND, (PR,))
    n = len(x_ND)
    precise, within = 0, 0
    recalled = torch.zeros(len(real_MD), dtype=torch.bool, device=x_ND.device)
    covered = recalled.clone()
    for part_BD, radius_B in zip(x_ND.split(CHUNK), radius_N.split(CHUNK)):
        distance_BM = torch.cdist(part_BD, real_MD)
        precise += int((distance_BM <= radius_PR_M).any(1).sum())
        inside_BM = distance_BM <= radius_DC_M
        within += int(inside_BM.sum())
        covered |= inside_BM.any(0)
        recalled |= (distance_BM <= radius_B[:, None]).any(0)
    values = (precise / n, float(recalled.double().mean()), within / (DC * n), float(covered.double().mean()))
    return dict(zip(names, values))
