"""Fidelity and diversity by nearest neighbours: precision, recall, density and coverage."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048  # vectors whose distances to as many others are held at a time
PR, DC = 3, 5  # neighbours that make a radius: Kynkäänniemi et al. 2019 (1904.06991), Naeem et al. 2020 (2002.09797)


def neighbour_radii(x_ND: Tensor, neighbours: tuple[int, ...] = (PR, DC)) -> tuple[Tensor, ...]:
    """Distance of each vector to its k-th nearest other one, (N), for each k; float64, more than k vectors."""
    parts = []
    for part_BD in x_ND.split(CHUNK):
        nearest_BK = part_BD.new_full((len(part_BD), max(neighbours) + 1), torch.inf)  # the first is itself
        for other_CD in x_ND.split(CHUNK):
            together = torch.cat([nearest_BK, torch.cdist(part_BD, other_CD)], 1)
            nearest_BK = together.topk(nearest_BK.shape[1], largest=False).values
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
    n, within = len(x_ND), 0
    precise_N = torch.zeros(n, dtype=torch.bool, device=x_ND.device)
    recalled_M, covered_M = torch.zeros(2, len(real_MD), dtype=torch.bool, device=x_ND.device).unbind()
    samples = x_ND.split(CHUNK), radius_N.split(CHUNK), precise_N.split(CHUNK)
    reals = [one.split(CHUNK) for one in (real_MD, radius_PR_M, radius_DC_M, recalled_M, covered_M)]
    for part_BD, radius_B, precise_B in zip(*samples):
        for real_CD, radius_PR_C, radius_DC_C, recalled_C, covered_C in zip(*reals):
            distance_BC = torch.cdist(part_BD, real_CD)
            inside_BC = distance_BC <= radius_DC_C
            within += int(inside_BC.sum())
            precise_B |= (distance_BC <= radius_PR_C).any(1)
            covered_C |= inside_BC.any(0)
            recalled_C |= (distance_BC <= radius_B[:, None]).any(0)
    precise, recalled, covered = (float(one.double().mean()) for one in (precise_N, recalled_M, covered_M))
    return dict(zip(names, (precise, recalled, within / (DC * n), covered)))
