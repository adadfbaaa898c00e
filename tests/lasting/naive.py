"""Reading in parts and leaning on what was kept, written out in numpy for transformers: what `lasting` is to give."""

import jax
import numpy as np

from atom_jax.kvcache.lasting.levels import merge
from atom_jax.models.transformer_variants import FAMILIES
from atom_jax.nn import rope


class Naive:
    """A model and what it keeps. Entries are (source, place, plain keys [l, h, k], values, score [l, h]), of the l
    layers that see everything."""

    def __init__(self, lm, settings):
        self.cfg, self.settings = lm.config, settings
        self.p = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params)
        self.blocks, self.waiting, self.source, self.tokens = [], [], -1, 0
        self.family = FAMILIES[self.cfg.family]
        kinds = self.cfg.layer_types or ("full",) * self.cfg.n_layers
        self.full = [i for i, kind in enumerate(kinds) if kind == "full"]

    def norm(self, x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.cfg.norm_eps) * w

    def heads(self, x, w):
        if w is None:
            return x
        flat = x if w.shape[0] == x.shape[-1] else x.reshape(len(x), -1)
        return self.norm(flat, w).reshape(x.shape)

    def turn(self, x_tnk, places, layer):
        scaling = self.cfg.rope_scaling if layer in self.full else None
        freq, factor = rope.frequencies(self.cfg.head_dim, self.cfg.rope_theta, scaling)
        places = np.asarray(places)
        angle = (places[:, None] if places.ndim == 1 else places)[..., None] * freq
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        a, b = np.split(x_tnk, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def run(self, ids, before_k, before_v):
        """Logits [t, v] of tokens behind s others (plain keys and values [l, s, h, k]), their plain keys and
        values in all layers, and weights [l, n, t, s + t]. Sliding layers have the window behind them."""
        s = before_k.shape[1]

        def before(i, q):
            if i not in self.full:
                return self.latest(i, s)
            rank = self.full.index(i)
            return before_k[rank], before_v[rank], np.arange(s)

        logits, k, v, weights = self.forward(ids, s, before)
        return logits, k, v, np.array([weights[i] for i in self.full])

    def latest(self, layer, end):
        """Of a sliding layer the window, whose places end at `end`; nothing where that is 0."""
        k, v = ((x[layer] if end else x[layer][:0]) for x in (self.window_k, self.window_v))
        return k, v, np.arange(end - len(k), end)

    def forward(self, ids, at, before):
        """As `run` for tokens at places from `at` on. before: (layer, plain queries [t, n, k]) -> plain keys, values
        [s, h, k] and places [s] (or [s, h]; beyond all others: nothing is there) of what stands before them."""
        cfg, t, post = self.cfg, len(ids), self.family.post_norm
        x, keys, values, weights = self.p["embed"][ids], [], [], []
        for i in range(cfg.n_layers):
            p = jax.tree.map(lambda a, i=i: a[i], self.p["layers"])
            y = x if post else self.norm(x, p["attn_norm"])
            a = p["attn"]
            q, k, v = (np.einsum("td,dnk->tnk", y, a[name]) for name in "qkv")
            q, k = self.heads(q, a.get("q_norm")), self.heads(k, a.get("k_norm"))
            keys.append(k)
            values.append(v)
            old_k, old_v, places = before(i, q)
            both_k = np.concatenate([self.turn(old_k, places, i), self.turn(k, np.arange(at, at + t), i)])
            both_v = np.concatenate([old_v, v])
            wide = places if places.ndim > 1 else np.repeat(places[:, None], cfg.n_kv_heads, axis=1)
            new = np.repeat(np.arange(at, at + t)[:, None], cfg.n_kv_heads, axis=1)
            where = np.concatenate([wide, new])
            g = cfg.n_heads // cfg.n_kv_heads
            scores = np.einsum("tnk,snk->nts", self.turn(q, np.arange(at, at + t), i), np.repeat(both_k, g, axis=1))
            scores = scores * cfg.head_dim**-0.5
            distance = np.arange(at, at + t)[:, None] - np.repeat(where, g, axis=1).T[:, None]
            seen = (distance >= 0) & ((distance < cfg.sliding_window) | (i in self.full))
            scores = np.where(seen, scores, -np.inf)
            w = np.exp(scores - scores.max(-1, keepdims=True))
            w /= w.sum(-1, keepdims=True)
            weights.append(w)
            out = np.einsum("nts,snk->tnk", w, np.repeat(both_v, g, axis=1))
            y = np.einsum("tnk,nkd->td", out, a["o"])
            x = x + (self.norm(y, p["attn_norm"]) if post else y)
            y = x if post else self.norm(x, p["mlp_norm"])
            m = p["mlp"]
            gate = y @ m["gate"]
            y = (gate / (1 + np.exp(-gate)) * (y @ m["up"])) @ m["down"]
            x = x + (self.norm(y, p["mlp_norm"]) if post else y)
        table = self.p["unembed"] if "unembed" in self.p else self.p["embed"].T
        return self.norm(x, self.p["norm"]) @ table, np.array(keys), np.array(values), weights

    def received(self, weights, part, later):
        """[l, h, n]: the largest weight of tokens `part` from queries after them. later: all queries are."""
        layers, _, t, _ = weights.shape
        own = weights[..., part]
        if not later:
            own = np.where(np.arange(t)[:, None] > np.arange(own.shape[-1])[None], own, 0)
        return own.reshape(layers, self.cfg.n_kv_heads, -1, own.shape[-1]).max(2)

    def read(self, ids):
        """A source."""
        part, sinks = self.settings.part, self.settings.sinks
        if self.source >= 0:
            self.leave(self.own)
        self.source += 1
        none = np.zeros((self.cfg.n_layers, 0, self.cfg.n_kv_heads, self.cfg.head_dim))
        if self.source == 0:
            self.window_k = self.window_v = none
        for start in range(0, len(ids), part):
            here = ids[start : start + part]
            if start == 0:
                before_k, before_v = none[self.full], none[self.full]
            elif start == part:
                before_k, before_v = self.window_k[self.full], self.window_v[self.full]
            else:
                before_k = np.concatenate([self.sink_k, self.window_k[self.full]], axis=1)
                before_v = np.concatenate([self.sink_v, self.window_v[self.full]], axis=1)
            _, k, v, w = self.run(here, before_k, before_v)
            s = before_k.shape[1]
            if start:
                self.leave(self.received(w, slice(s - part, s), True))
            else:
                self.sink_k, self.sink_v = k[self.full, :sinks], v[self.full, :sinks]
            self.first, self.window_k, self.window_v = start, k, v
            self.own = self.received(w, slice(s, None), False)

    def leave(self, score_lhn):
        """The window leaves."""
        for i in range(self.window_k.shape[1]):
            place = self.first + i
            if place < self.settings.sinks:
                continue
            score = score_lhn[:, :, i]
            if self.settings.score == "observed":
                layers = len(score)
                score = np.full_like(score, score[layers // 3 : max(4 * layers // 5, layers // 3 + 1)].mean())
            k, v = (x[self.full, i].astype(np.float16).astype(np.float64) for x in (self.window_k, self.window_v))
            self.waiting.append((self.source, place, k, v, score))
            if len(self.waiting) == self.settings.law.block:
                self.blocks.append((0, self.best(self.each(self.waiting), self.settings.law.keep(0))))
                self.waiting = []
                while (at := merge([level for level, _ in self.blocks])) is not None:
                    (level, a), (_, b) = self.blocks[at : at + 2]
                    both = [[x + y for x, y in zip(*rows)] for rows in zip(a, b)]
                    self.blocks[at : at + 2] = [(level + 1, self.best(both, self.settings.law.keep(level + 1)))]

    def each(self, entries):
        """[l][h] lists of (source, place, key, value, score)."""
        return [
            [[(s, p, k[i, j], v[i, j], r[i, j]) for s, p, k, v, r in entries] for j in range(self.cfg.n_kv_heads)]
            for i in range(len(self.full))
        ]

    def best(self, entries, keep):
        def of(head):
            return sorted(sorted(head, key=lambda e: (-e[4], -e[0], -e[1]))[:keep], key=lambda e: e[:2])

        return [[of(head) for head in layer] for layer in entries]

    def held(self):
        """[l][h] lists of all entries in order."""
        parts = [entries for _, entries in self.blocks] + [self.each(self.waiting)]
        return [
            [[e for part in parts for e in part[i][j]] for j in range(self.cfg.n_kv_heads)]
            for i in range(len(self.full))
        ]

    def ask(self, ids):
        """Logits [t, v] of a prompt."""
        return self.run(ids, *self.front())[0]

    def weights(self, ids):
        """[l, n, t, s], what the tokens of a prompt pay to what stands before it."""
        k, v = self.front()
        return self.run(ids, k, v)[3][..., : k.shape[1]]

    def front(self):
        """Plain keys and values [l, s, h, k] of all that stands before a prompt."""
        held = self.held()
        k, v = (np.array([[[e[n] for e in head] for head in layer] for layer in held]).swapaxes(1, 2) for n in (2, 3))
        skip = 0 if self.first else min(self.settings.sinks, self.window_k.shape[1])
        k = np.concatenate([self.sink_k, k, self.window_k[self.full, skip:]], axis=1)
        return k, np.concatenate([self.sink_v, v, self.window_v[self.full, skip:]], axis=1)

    def answer(self, ids, n, choice):
        """Logits [v] after a prompt and after each of the n likeliest tokens behind it; pages are chosen: for the
        prompt by what all heads of the middle layers want of them, once each has chosen by itself."""
        held, layers, h = self.held(), self.cfg.n_layers, self.cfg.n_kv_heads
        skip = 0 if self.first else self.settings.sinks
        near_k = np.concatenate([self.sink_k, self.window_k[self.full, skip:]], axis=1)
        near_v = np.concatenate([self.sink_v, self.window_v[self.full, skip:]], axis=1)
        sinks, room = self.sink_k.shape[1], choice.pages * choice.page
        near = np.append(np.arange(sinks), np.arange(sinks + room, near_k.shape[1] + room))
        at = begin = near_k.shape[1] + room
        own_k = own_v = np.zeros((layers, 0, h, self.cfg.head_dim))
        pages, recent = [None] * layers, [[] for _ in range(layers)]
        asked, together = {}, None

        def chosen(i, q, together=None):
            g = q.shape[1] // h
            of = held[self.full.index(i)]
            asked[self.full.index(i)] = own = [
                self.demand(q[:, j * g : (j + 1) * g], of[j], choice) for j in range(h)
            ]
            each = [self.pages(own[j] if together is None else together, of[j], choice) for j in range(h)]
            k = np.zeros((max(map(len, each)), h, self.cfg.head_dim))
            v, places = k.copy(), np.full(k.shape[:2], 10**6)
            for j, one in enumerate(each):
                k[: len(one), j], v[: len(one), j] = np.array([e[2] for e in one]), np.array([e[3] for e in one])
                places[: len(one), j] = sinks + np.arange(len(one))
            return k, v, places

        def before(i, q):
            if i not in self.full:
                k, v, places = self.latest(i, begin)
                places = np.append(places, np.arange(begin, at))
                return np.concatenate([k, own_k[i]]), np.concatenate([v, own_v[i]]), places
            if len(q) > 1:
                pages[i] = chosen(i, q, together)
            else:
                recent[i].append(q)
            k, v, places = pages[i]
            wide = lambda x: np.repeat(x[:, None], h, axis=1)  # noqa: E731
            own, rank = np.arange(begin, begin + own_k.shape[1]), self.full.index(i)
            return (
                np.concatenate([near_k[rank], k, own_k[i]]), np.concatenate([near_v[rank], v, own_v[i]]),
                np.concatenate([wide(near), places, wide(own)]),
            )  # fmt: skip

        self.forward(ids, at, before)
        middle = range(len(self.full))[len(self.full) // 3 : max(4 * len(self.full) // 5, len(self.full) // 3 + 1)]
        together = np.mean([asked[i] for i in middle], (0, 1))
        out = []
        for _ in range(n + 1):
            logits, k, v, _ = self.forward(ids, at, before)
            for i in range(layers):
                if i in self.full and len(recent[i]) == choice.stride:
                    pages[i], recent[i] = chosen(i, np.concatenate(recent[i][-choice.queries :])), []
            own_k, own_v = np.concatenate([own_k, k], axis=1), np.concatenate([own_v, v], axis=1)
            out.append(logits[-1])
            at, ids = at + len(ids), np.array([logits[-1].argmax()])
        return np.array(out)

    def demand(self, q_tgk, entries, choice):
        """How much queries want each page of the entries of one head."""
        k = np.array([e[2] for e in entries])
        scores = np.einsum("tgk,sk->tgs", q_tgk, k) * self.cfg.head_dim**-0.5
        w = np.exp(scores - scores.max(-1, keepdims=True))
        w = (w / w.sum(-1, keepdims=True)).max((0, 1))
        return [w[a : a + choice.page].max() for a in range(0, len(w), choice.page)]

    def pages(self, demand, entries, choice):
        """The entries of one head in the pages that are wanted most."""
        if choice.successors:
            demand = [max(x, y) for x, y in zip(demand, [0, *demand])]
        best = sorted(sorted(range(len(demand)), key=lambda i: -demand[i])[: choice.pages])
        return [e for i in best for e in entries[i * choice.page : (i + 1) * choice.page]]
