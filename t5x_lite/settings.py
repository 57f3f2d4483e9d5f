"""What a text is written with: length, sampling, beams, what may not be repeated."""

import dataclasses

from t5x_lite.sampling import Sampling

# What a beam's log-probability is divided by, given its length and length_penalty.
LENGTH_NORMS = {
    "wu": lambda length, alpha: ((5.0 + length) / 6.0) ** alpha,
    "length": lambda length, alpha: length**alpha,
}
EARLY_STOPPING = ("never", "false", "true")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How texts are written.

    Attributes:
      max_length: tokens to write at most, EOS included, prefix excluded.
      min_length: no EOS before so many tokens.
      temperature, top_k, top_p: see `Sampling`; temperature 0 = no sampling.
      beams: 1 = none; else the width of beam search.
      length_penalty: alpha; a beam's score is its log-probability over a norm of its
        length (EOS counted). T5 took 0.6 with 4 beams (Raffel et al. 2020, section
        3.1.2); 0 = none.
      length_norm: "wu" is ((5 + length) / 6)^alpha (Wu et al. 2016, section 7), which
        T5 used; "length" is length^alpha, as in transformers.
      early_stopping: when a row has as many finished texts as beams: "never" goes on
        until no unfinished text can become better; "false" judges that by the length
        reached so far, as transformers does by default; "true" stops.
      no_repeat_ngram: no n-gram of so many tokens comes twice; 0 = no limit.
      num_return: texts for each row: the best of the beams, or so many samples.
    """

    max_length: int = 64
    min_length: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    beams: int = 1
    length_penalty: float = 0.6
    length_norm: str = "wu"
    early_stopping: str = "never"
    no_repeat_ngram: int = 0
    num_return: int = 1

    def __post_init__(self):
        for name in ("max_length", "beams", "num_return"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        _ = self.sampling
        if not 0 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length={self.min_length} must be in [0, max_length="
                f"{self.max_length}]."
            )
        if not 0.0 <= self.length_penalty < float("inf"):
            raise ValueError(
                f"length_penalty={self.length_penalty} must be at least 0 (none)."
            )
        for name, among in (
            ("length_norm", tuple(LENGTH_NORMS)),
            ("early_stopping", EARLY_STOPPING),
        ):
            if getattr(self, name) not in among:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: allowed are {', '.join(among)}."
                )
        if self.no_repeat_ngram < 0:
            raise ValueError(
                f"no_repeat_ngram={self.no_repeat_ngram} must be at least 0 (no limit)."
            )
        if self.beams > 1 and self.temperature:
            raise ValueError(
                f"temperature={self.temperature} samples, beams={self.beams} searches. "
                "Leave one of them out."
            )
        most = self.beams if not self.temperature else self.num_return
        if self.num_return > most:
            raise ValueError(
                f"num_return={self.num_return} of beams={self.beams} and temperature="
                "0: there are no more texts than beams. Set beams="
                f"{self.num_return}, or sample with a temperature."
            )

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)
