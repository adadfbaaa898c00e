"""The longest token of a vocabulary that ends at each byte of a text: an Aho-Corasick automaton in flat tables.

A state is the longest end of the text that begins some token. Rows of the transition table differ from those of the
state's own shorter ends in a few bytes only, so that a row is kept as a bitmap of those bytes and their targets, and
all other bytes are looked up in the row of the last two bytes. One transition is five reads, on the host or on a
device, whatever the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# Special ids 0 to 3 (pad, bos, unused, a mark that is passed over), then the bytes; then all of them once more, as
# ends of patches (`tokenizers.bolmo`).
SPECIALS, SYMBOLS, PASSED_OVER = 4, 260, 3
# States of up to so many bytes have whole rows.
_NEAR = 2


class Tables(NamedTuple):
    """The automaton. n states, e transitions of their own, a states with whole rows.

    bits u32 [8 n]: the 256 bytes of every state, 1 where it has a target of its own; base i32 [8 n]: where the
    targets of such a group of 32 begin. target i32 [e]. anchor i32 [n]: 256 times the whole row that it falls back
    to; near i32 [256 a]: the whole rows. out i32 [n]: id of the longest token that ends here. special i32 [4]: states
    after the special ids.
    """

    bits: np.ndarray
    base: np.ndarray
    target: np.ndarray
    anchor: np.ndarray
    near: np.ndarray
    out: np.ndarray
    special: np.ndarray


def advance(tables: Any, state: Any, ids: Any, xp: Any = np) -> Any:
    """States after one more id each (0 is the state before a text), of any shape, with numpy or, as xp, jax.numpy."""
    symbol = ids % SYMBOLS
    byte = xp.maximum(symbol - SPECIALS, 0)
    word, bit = state * 8 + byte // 32, (byte % 32).astype(xp.uint32)
    bits, one = tables.bits[word], xp.uint32(1)
    place = tables.base[word] + xp.bitwise_count(bits & ((one << bit) - one)).astype(xp.int32)
    far = tables.target[xp.minimum(place, tables.target.shape[0] - 1)]
    near = tables.near[tables.anchor[state] + byte]
    after = xp.where((bits >> bit) & one == one, far, near)
    special = xp.where(symbol == PASSED_OVER, state, tables.special[xp.minimum(symbol, SPECIALS - 1)])
    return xp.where(symbol < SPECIALS, special, after)


def states(tables: Tables, ids: np.ndarray, longest: int) -> np.ndarray:
    """States i32 [b, t] after each position of ids [b, t].

    longest: bytes of the longest token. A state depends on so many bytes only: long rows are read in many pieces
    side by side, each from so far before its own beginning.
    """
    b, t = ids.shape
    before, size = (0, max(t, 1)) if t <= 4 * longest else (longest, 4 * longest)
    lanes = -(-t // size)
    # Id 2 leads back to the state before a text.
    padded = np.pad(ids.astype(np.int32), ((0, 0), (before, lanes * size - t)), constant_values=2)
    starts = np.arange(lanes) * size
    state, out = np.zeros((b, lanes), np.int32), np.empty((b, lanes, size), np.int32)
    for i in range(before + size):
        state = advance(tables, state, padded[:, starts + i])
        if i >= before:
            out[:, :, i - before] = state
    return out.reshape(b, -1)[:, :t]


def build(pieces: dict[int, bytes], bos: int | None = None, pad: int | None = None) -> Tables:
    """The automaton of a vocabulary (id -> bytes) in which bos and pad are what special ids 1 and 0 stand for, and
    not the bytes of their names. Of tokens with the same bytes the highest id counts. Where no token ends (some
    vocabularies, SmolLM2's for one, lack control characters and bytes that UTF-8 has no use for), bos counts.
    """
    words = {i: piece for i, piece in sorted(pieces.items()) if piece and i not in (bos, pad)}
    trie = _Trie(words, bos or 0)
    bits, base, target, anchor, near = trie.rows()
    n = trie.n
    # Two states more: after bos and after pad. Their rows are those of the state before a text.
    special = np.array([n + 1 if pad is not None else 0, n if bos is not None else 0, 0, 0], np.int32)
    out = np.concatenate([trie.out, [bos or 0, pad or 0]]).astype(np.int32)
    more = np.zeros(16, np.uint32)
    return Tables(
        np.concatenate([bits, more]), np.concatenate([base, more.astype(np.int32)]), target,
        np.concatenate([anchor, [0, 0]]).astype(np.int32), near, out, special,
    )  # fmt: skip


class _Trie:
    """Beginnings of words by length; n of them, the empty one first. parent, symbol, fail, out i32 [n]; the children
    of a node are numbered in a row, by symbol; levels: (first, end) of every length from 0 on."""

    def __init__(self, words: dict[int, bytes], nothing: int):
        sizes = np.array([len(w) for w in words.values()])
        flat = np.frombuffer(b"".join(words.values()), np.uint8).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        node, ids = np.zeros(len(sizes), np.int64), np.array(list(words))
        parents, symbols, self.levels, self.n = [np.array([-1])], [np.array([-1])], [(0, 1)], 1
        for depth in range(sizes.max()):
            longer = sizes > depth
            keys, where = np.unique(node[longer] * 256 + flat[starts[longer] + depth], return_inverse=True)
            node[longer] = self.n + where
            parents.append(keys // 256)
            symbols.append(keys % 256)
            self.levels.append((self.n, self.n + len(keys)))
            self.n += len(keys)
        self.parent, self.symbol = np.concatenate(parents), np.concatenate(symbols)
        self.keys = self.parent[1:] * 256 + self.symbol[1:]
        self.out = np.full(self.n, nothing, np.int64)
        is_word = np.zeros(self.n, bool)
        # Later ids overwrite earlier ones.
        self.out[node], is_word[node] = ids, True
        self.fail = np.zeros(self.n, np.int64)
        for first, end in self.levels[2:]:
            nodes = np.arange(first, end)
            self.fail[nodes] = self._longest(self.fail[self.parent[nodes]], self.symbol[nodes])
            self.out[nodes] = np.where(is_word[nodes], self.out[nodes], self.out[self.fail[nodes]])

    def _child(self, nodes: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Children, 0 where there is none."""
        keys = nodes * 256 + symbols
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at + 1, 0)

    def _longest(self, nodes: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """The child of the longest end of each node that has one."""
        out = self._child(nodes, symbols)
        while (left := np.flatnonzero((out == 0) & (nodes > 0))).size:
            nodes = nodes.copy()
            nodes[left] = self.fail[nodes[left]]
            out[left] = self._child(nodes[left], symbols[left])
        return out

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """bits, base, target, anchor, near as `Tables` has them, for these nodes."""
        whole = self.levels[min(_NEAR, len(self.levels) - 1)][1]
        nodes, symbols = np.divmod(np.arange(whole * 256), 256)
        near = self._longest(nodes, symbols).astype(np.int32)
        anchor = np.arange(self.n)
        # (node, symbol, target) of all targets that are longer than what `near` knows, node by node.
        count, start = np.zeros(self.n, np.int64), np.zeros(self.n, np.int64)
        keys, targets, total = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        everything = targets[0]
        for first, end in self.levels[_NEAR + 1 :]:
            level = np.arange(first, end)
            anchor[level] = anchor[self.fail[level]]
            lo, hi = np.searchsorted(self.keys, [first * 256, end * 256])
            theirs = ranges(start[self.fail[level]], count[self.fail[level]])
            inherited = np.repeat(level, count[self.fail[level]]) * 256 + np.concatenate(keys)[theirs] % 256
            other = ~np.isin(inherited, self.keys[lo:hi])
            key = np.concatenate([self.keys[lo:hi], inherited[other]])
            everything = np.concatenate(targets)
            to = np.concatenate([np.arange(lo + 1, hi + 1), everything[theirs][other]])
            order = np.argsort(key)
            keys.append(key[order])
            targets.append(to[order])
            count[level] = np.bincount(key // 256 - first, minlength=end - first)
            start[level] = total + np.cumsum(count[level]) - count[level]
            total += len(key)
        key, target = np.concatenate(keys), np.concatenate([*targets, [0]])
        word = key // 32
        bits = np.zeros(self.n * 8, np.uint32)
        np.bitwise_or.at(bits, word, np.uint32(1) << (key % 32).astype(np.uint32))
        base = np.searchsorted(word, np.arange(self.n * 8))
        return bits, base.astype(np.int32), target.astype(np.int32), anchor * 256, near


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for every start, as many as its count, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
