"""Random numbers of a batch of examples, each a function of (seed, example index)."""

import numpy as np


class Draws:
    """Random numbers for the examples first_index .. first_index + batch - 1.

    Row b of every block depends only on (seed, first_index + b, which call it is), so
    an example is the same in whatever batch, on whatever host, it is made. NumPy's
    Philox is counter-based (Salmon et al. 2011): keyed by (seed, call), with the
    counter set to the example's place, one library call fills the block.

    Args:
        seed: any integer; taken modulo 2**64.
        first_index: global index of the first example, >= 0.
        batch: B, the number of consecutive examples.
    """

    def __init__(self, seed: int, first_index: int, batch: int):
        self.seed = seed % 2**64
        self.first_index = first_index
        self.batch = batch
        self._calls = 0

    def bits(self, n: int) -> np.ndarray:
        """Uniform uint64 [B, n]."""
        # One counter value gives 4 words: whole counters per row keep rows apart.
        counters = -(-n // 4)
        philox = np.random.Philox(
            key=np.array([self.seed, self._calls], np.uint64),
            counter=self.first_index * counters,
        )
        self._calls += 1
        words = philox.random_raw(self.batch * counters * 4)
        return words.reshape(self.batch, counters * 4)[:, :n]

    def bits32(self, n: int) -> np.ndarray:
        """Uniform uint32 [B, n], two from each word."""
        words = np.ascontiguousarray(self.bits(-(-n // 2)), "<u8")
        return words.view("<u4")[:, :n]

    def uniform(self, n: int) -> np.ndarray:
        """Uniform float64 [B, n] in [0, 1), 53 random bits each."""
        return (self.bits(n) >> np.uint64(11)) * 2.0**-53

    def subset(self, n: int, k: int) -> np.ndarray:
        """k of the numbers 0 .. n-1 without replacement, ascending: int64 [B, k].

        All subsets are equally likely, up to ties of the keys' random part (at least
        21 bits), which put the smaller number first.
        """
        # The k smallest random keys win. The number rides in the key's low bits, so a
        # plain partition (vectorised in NumPy; argpartition is nine times slower here)
        # finds the winners and no two keys are equal on any machine.
        if k == 0:
            return np.zeros((self.batch, 0), np.int64)
        width = n.bit_length()
        keys = self.bits32(n) if width <= 11 else self.bits(n)
        low = keys.dtype.type(2**width - 1)
        keys = (keys & ~low) | np.arange(n, dtype=keys.dtype)
        if k < n:
            keys = np.partition(keys, k - 1, axis=1)[:, :k]
        return np.sort(keys & low, axis=1).astype(np.int64)
