"""The exact assignment problem, for the few faces of a picture.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_assignment(gains: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pair rows with columns, each at most once, so that the sum of the pairs' gains is largest.

    The Hungarian method in its shortest-augmenting-path form, O(min(R, C)^2 max(R, C)).

    Args:
        gains: finite gains, R rows of C.

    Returns:
        min(R, C) pairs (row, column), in the order of their rows.
    """
    if not gains or not gains[0]:
        return []
    costs = [[-gain for gain in row] for row in gains]
    if len(costs) <= len(costs[0]):
        return sorted(_pairs(costs))
    transposed = [list(column) for column in zip(*costs, strict=True)]
    return sorted((row, column) for column, row in _pairs(transposed))


def _pairs(costs: list[list[float]]) -> list[tuple[int, int]]:
    """The cheapest assignment of every row, for no more rows than columns."""
    n_columns = len(costs[0])
    row_prices, column_prices = [0.0] * len(costs), [0.0] * n_columns
    owners = [-1] * n_columns  # the row that holds each column
    for start in range(len(costs)):
        # Dijkstra over columns in reduced costs (cost less both prices), until it meets a column that is free.
        distances, before, done = [math.inf] * n_columns, [-1] * n_columns, []
        row, column, reached = start, -1, 0.0
        while row >= 0:
            open_columns = [c for c in range(n_columns) if c not in done]
            for c in open_columns:
                distance = reached + costs[row][c] - row_prices[row] - column_prices[c]
                if distance < distances[c]:
                    distances[c], before[c] = distance, column
            column = min(open_columns, key=distances.__getitem__)
            reached, row = distances[column], owners[column]
            done.append(column)
        # Prices keep all reduced costs non-negative, and those of the assignment zero.
        row_prices[start] += reached
        for c in done[:-1]:
            row_prices[owners[c]] += reached - distances[c]
            column_prices[c] -= reached - distances[c]
        while column >= 0:
            owners[column] = start if before[column] < 0 else owners[before[column]]
            column = before[column]
    return [(row, column) for column, row in enumerate(owners) if row >= 0]
