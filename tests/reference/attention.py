"""Attention as the formula reads, one query at a time, in float64."""

import numpy as np


def reference_attention(query, key, value, query_index, segment_ids) -> np.ndarray:
    """softmax(q k / sqrt(d)) v over the keys that a query may see; query head h uses key head h // group."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, head_dim = query.shape
    group = heads // key.shape[2]
    out = np.zeros_like(query)
    for b in range(batch):
        for i in range(length):
            last = i if query_index is None else query_index[b, i]
            seen = [
                s
                for s in range(key.shape[1])
                if s <= last and (segment_ids is None or segment_ids[b, s] == segment_ids[b, i])
            ]
            for h in range(heads):
                scores = key[b, seen, h // group] @ query[b, i, h] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights / weights.sum() @ value[b, seen, h // group]
    return out
