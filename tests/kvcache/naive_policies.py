"""Cache policies written down one row, head and query at a time, in float64."""

import math

import numpy as np

from atom_jax.nn import rope


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(q, k, at, positions):
    """Weights of a query [k] at position `at` on keys [s, k]; 0 for keys after it."""
    seen = positions <= at
    weights = np.zeros(len(k))
    weights[seen] = softmax(k[seen] @ q / math.sqrt(len(q)))
    return weights


def all_weights(q, k):
    """Weights [h, g, t, t] of a whole prompt: q [h, g, t, k], k [h, t, k]."""
    h, g, t, _ = q.shape
    places = np.arange(t)
    rows = [attention(q[a, b, i], k[a], i, places) for a in range(h) for b in range(g) for i in range(t)]
    return np.array(rows).reshape(h, g, t, t)


def streaming_llm(p, q, k, v):
    return np.tile(np.arange(k.shape[1], dtype=float), (len(k), 1))


def tova(p, q, k, v):
    return np.tile(all_weights(q, k)[:, :, -1].mean((0, 1)), (len(k), 1))


def h2o(p, q, k, v):
    return all_weights(q, k).sum((1, 2))


def observed_attention(p, q, k, v):
    t = k.shape[1]
    return all_weights(q, k).sum((1, 2)) / (t - np.arange(t))


def knorm(p, q, k, v):
    return -np.sqrt((k**2).sum(-1))


def keydiff(p, q, k, v):
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    mean = unit.mean(1, keepdims=True)
    return -(unit * mean).sum(-1) / np.linalg.norm(mean, axis=-1)


def ids(positions):
    """Token ids of the texts here."""
    return positions * 7 % 11


def sepllm(p, q, k, v):
    at = np.arange(k.shape[1])
    return np.tile(np.where(np.isin(ids(at), p.separators), 1e6, 0.0) + at, (len(k), 1))


def snapkv(p, q, k, v):
    (h, t, _), w = k.shape, p.window
    score = np.full((h, t), np.inf)
    if t > w:
        mean = all_weights(q, k)[:, :, -w:, : t - w].mean((1, 2))
        padded = np.pad(mean, ((0, 0), (p.pool // 2, p.pool // 2)))
        score[:, : t - w] = [[row[i : i + p.pool].mean() for i in range(t - w)] for row in padded]
    return score


def rotation(size, theta, positions):
    """Mean of RoPE's matrices at these positions."""
    freq, _ = rope.frequencies(size, theta)
    out, half = np.zeros((size, size)), size // 2
    for i, f in enumerate(freq):
        c, s = np.cos(positions * f).mean(), np.sin(positions * f).mean()
        out[i, i] = out[i + half, i + half] = c
        out[i, i + half], out[i + half, i] = -s, s
    return out


def expected_attention(p, q, k, v):
    h, g, t, size = q.shape
    score = np.full((h, t), np.inf)
    turn = rotation(size, 10000.0, np.arange(t, t + p.future))
    for a in range(h):
        heads = []
        for b in range(g):
            past = [rotation(size, 10000.0, np.array([i])).T @ q[a, b, i] for i in range(p.sinks, t)]
            mean, cov = np.mean(past, 0), np.cov(np.array(past).T, bias=True)
            mean, cov = turn @ mean, turn @ cov @ turn.T
            keys = k[a, p.sinks :]
            spread = np.array([x @ cov @ x for x in keys])
            heads.append(softmax(keys @ mean / math.sqrt(size) + spread / (2 * size)))
        score[a, p.sinks :] = (np.mean(heads, 0) + p.eps) * np.linalg.norm(v[a, p.sinks :], axis=-1)
    return score


def recent(p, limit):
    window = min(p.window, max(limit - p.sinks, 0)) if p.name == "sepllm" else 0
    return {"tova": 1, "h2o": limit // 2}.get(p.name, window)


def rank(p, score, position, last, limit):
    """What decides between entries: the largest is kept."""
    sink, new = position < p.sinks, position > last - recent(p, limit)
    order = 2**30 - position if sink else position
    return (math.inf if sink or new else score, order)


def tied(p, score, at):
    """Whether a score is as good as equal to another."""
    return score == at or (math.isfinite(at) and abs(score - at) <= 2.0**-p.digits * abs(at))


def largest(p, ranks, n):
    """Numbers of the n largest of [(score, order)], by their order where scores are tied with the least of these."""
    every = range(len(ranks))
    at = ranks[sorted(every, key=lambda i: ranks[i], reverse=True)[min(n, len(ranks)) - 1]][0]
    place = lambda i: (1 if tied(p, ranks[i][0], at) else 2 * (ranks[i][0] > at), ranks[i][1])  # noqa: E731
    return sorted(every, key=place, reverse=True)[:n]


def least(p, ranks):
    """The number of [(score, order)] that has the least score, and of those that are tied with it the least order."""
    at = min(ranks)[0]
    return min(range(len(ranks)), key=lambda i: (not tied(p, ranks[i][0], at), ranks[i][1]))


def kept(p, score, n):
    """Sets of positions that the heads keep of a prompt with these scores [h, t]: n for each."""
    t = score.shape[1]
    return [set(largest(p, [rank(p, row[i], i, t - 1, n) for i in range(t)], n)) for row in score]


def kept_together(p, score, n):
    """The same where the heads share h * n entries."""
    (h, t), n = score.shape, min(n, score.shape[1])
    score = score.copy()
    for row in score:
        row[largest(p, [(row[i], i) for i in range(t)], int(p.floor * n))] = np.inf
    best = largest(p, [(score[a, i], (i, -a)) for a in range(h) for i in range(t)], h * n)
    return [{j % t for j in best if j // t == a} for a in range(h)]


class Replay:
    """One row whose keys and values are all there, with the set that each head keeps."""

    def __init__(self, p, q, k, v, limit):
        self.p, self.k, self.v, self.limit = p, k, v, limit
        self.score = globals()[p.name](p, q, k, v)
        self.sets = kept(p, self.score, limit)

    def step(self, q, k, v):
        """Attention [h, g, k] of one more token."""
        self.k, self.v = (np.concatenate([a, b[:, None]], 1) for a, b in ((self.k, k), (self.v, v)))
        at = self.k.shape[1] - 1
        for a, held in enumerate(self.sets):
            if len(held) == self.limit:
                places = sorted(held)
                ranks = [rank(self.p, self.score[a, i], i, at - 1, self.limit) for i in places]
                held.remove(places[least(self.p, ranks)])
            held.add(at)
        self.score = np.pad(self.score, ((0, 0), (0, 1)))
        places = [np.array(sorted(held)) for held in self.sets]
        weights = [np.array([attention(x, self.k[a, places[a]], at, places[a]) for x in q[a]]) for a in range(len(q))]
        out = np.array([w @ self.v[a, places[a]] for a, w in enumerate(weights)])
        self._observe(places, weights, at)
        return out

    def _observe(self, places, weights, at):
        for a, (here, w) in enumerate(zip(places, weights)):
            match self.p.name:
                case "streaming_llm":
                    self.score[a, at] = at
                case "sepllm":
                    self.score[a, at] = at + 1e6 * (ids(at) in self.p.separators)
                case "knorm":
                    self.score[a, at] = -np.linalg.norm(self.k[a, at])
                case "h2o":
                    self.score[a, here] += w.sum(0)
                case "observed_attention":
                    # A mean over the queries so far, to which one is added.
                    seen = at - here
                    self.score[a, here] = (self.score[a, here] * seen + w.sum(0)) / (seen + 1)
                case "tova":
                    self.score[a, here] = np.mean(weights, (0, 1))
                case "keydiff":
                    self.score[a, here] = keydiff(None, None, self.k[a, here][None], None)[0]


def razor_attention(p, q, k, v, retrieves, near):
    """Attention [h, g, k] of the last token, by the definition: heads that do not retrieve see `sinks` tokens, `near`
    newest ones, and the mean of those between, as often as there are such."""
    h, g, t, size = q.shape
    out = np.zeros((h, g, size))
    for a in range(h):
        first = p.sinks if t > p.sinks + near and not retrieves[a] else t
        last = max(t - near, first)
        keys, values, many = [*k[a, :first], *k[a, last:]], [*v[a, :first], *v[a, last:]], [1] * (first + t - last)
        if last > first:
            keys.append(k[a, first:last].mean(0))
            values.append(v[a, first:last].mean(0))
            many.append(last - first)
        for b in range(g):
            scores = np.array(keys) @ q[a, b, -1] / math.sqrt(size) + np.log(many)
            out[a, b] = softmax(scores) @ np.array(values)
    return out


def kvcompose(p, layers, total):
    """Sets of positions that every layer and head keeps of a prompt, as [l][h]. layers: of each its (q, k, v) over
    the prompt and its second reading; total: entries of all lists together."""
    scores = []
    for q, k, v in layers:
        t = k.shape[1] // 2
        most = all_weights(q, k)[:, :, t:, :t].max(2).mean(1)
        if p.norms:
            most = most * np.linalg.norm(v[:, :t], axis=-1)
        scores.append(most + most.mean(0))
    ranked = [-np.sort(-s, axis=1) for s in scores]
    lists = [r.mean(0) for r in ranked] if p.structured else [row for r in ranked for row in r]
    if p.first and p.structured:
        lists[0] = np.max(lists, axis=0)
    best = sorted(((x, i) for i, row in enumerate(lists) for x in row), reverse=True)[:total]
    counts = [max(sum(i == n for _, i in best), 1) for n in range(len(lists))]
    h = len(scores[0])
    counts = [[c] * h for c in counts] if p.structured else np.reshape(counts, (-1, h)).tolist()
    return [[set(np.argsort(-row)[:n].tolist()) for row, n in zip(s, c)] for s, c in zip(scores, counts)]


def shared(p, layers, n, learned):
    """The positions that all layers and heads keep of a prompt. layers: of each its (q, k, v); learned: of each the
    weights of a learned score."""
    t = layers[0][1].shape[1]
    later = np.tril(np.ones((t, t)), -1) * np.triu(np.ones((t, t)), 1 - p.horizon)
    paid = [all_weights(q, k) * later for q, k, _ in layers]
    first = len(layers) // 3
    score = np.mean([x.max((1, 2)) for x in paid[first : max(4 * len(layers) // 5, first + 1)]], (0, 1))
    if p.learned:
        score = np.zeros(t)
        for x, own in zip(paid, learned):
            seen = np.log(x.max((1, 2)) + 1e-4), np.log(x.sum((1, 2)) + 1e-3)
            score += sum(np.asarray(own[name]) @ one for name, one in zip(("most", "total"), seen))
        near = np.maximum(1 - abs(np.subtract.outer(np.arange(t), np.arange(t))) / 5, 0)
        score = near @ score / near.sum(1)
    order = [(i < p.sinks or i >= t - p.window, -i if i < p.sinks else i) for i in range(t)]
    best = sorted(range(t), key=lambda i: (order[i][0], order[i][1] if order[i][0] else score[i]), reverse=True)
    return set([*range(min(p.sinks, n)), *[i for i in best if i >= p.sinks]][:n])
