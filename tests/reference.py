"""Slow and obvious NumPy versions of what jaxad computes fast. Loops, float64, no cleverness."""

import numpy as np


def regions(mask):
    """Connected regions of one (H, W) mask, corners touching: a list of boolean (H, W). Flood fill."""
    left = {tuple(point) for point in np.argwhere(mask)}
    found = []
    while left:
        region, front = np.zeros(mask.shape, bool), [left.pop()]
        while front:
            y, x = front.pop()
            region[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        found.append(region)
    return found


def aupro(maps, masks, *, limit):
    """Area under the per-region overlap curve up to a rate of false positives, over that rate. Every score is tried."""
    all_regions = [(i, region) for i, mask in enumerate(masks) for region in regions(mask > 0)]
    normal = masks == 0
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        flagged = maps >= threshold
        overlap = np.mean([flagged[i][region].mean() for i, region in all_regions])
        points.append((flagged[normal].mean(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        if x0 < limit < x1:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def auroc(scores, labels):
    """Share of (anomalous, normal) pairs in the right order, ties counting half."""
    anomalous, normal = scores[labels == 1], scores[labels == 0]
    return np.mean([(a > n) + 0.5 * (a == n) for a in anomalous for n in normal])


def average_precision(scores, labels):
    """Precision at each threshold, weighed by the recall it adds."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        flagged = scores >= threshold
        recall = flagged[labels == 1].mean()
        total += (recall - recall_before) * labels[flagged].mean()
        recall_before = recall
    return total


def f1max(scores, labels):
    """Best F1 over all thresholds, and the highest threshold that reaches it."""
    best, at = -1.0, None
    for threshold in sorted(set(scores.tolist()), reverse=True):
        flagged = scores >= threshold
        hits = np.sum(flagged & (labels == 1))
        f1 = 2 * hits / (2 * hits + np.sum(flagged & (labels == 0)) + np.sum(~flagged & (labels == 1)))
        if f1 > best:
            best, at = f1, threshold
    return best, at
