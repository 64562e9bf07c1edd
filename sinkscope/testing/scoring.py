"""Score what a detector found against what was planted."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Counts of found and planted tokens.

    Attributes:
        hits: Planted tokens that were found.
        found: Tokens that were found.
        planted: Tokens that were planted.
    """

    hits: int = 0
    found: int = 0
    planted: int = 0

    @property
    def precision(self) -> float:
        """Share of the found tokens that were planted; 1 if nothing was found."""
        return self.hits / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of the planted tokens that were found; 1 if nothing was planted."""
        return self.hits / self.planted if self.planted else 1.0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.hits + other.hits, self.found + other.found, self.planted + other.planted)


def score(found: Bool[Tensor, "..."], planted: Bool[Tensor, "..."]) -> Score:
    """Count hits of one mask against another of the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if found.shape != planted.shape:
        raise ValueError(
            f"Got masks of shapes {tuple(found.shape)} and {tuple(planted.shape)}; expected one shape"
        )
    return Score(int((found & planted).sum()), int(found.sum()), int(planted.sum()))
