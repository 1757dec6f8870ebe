"""Examples that are read one by one, as they are too many for memory."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np


class Encoded(NamedTuple):
    """An example as it is stored.

    Attributes:
        blob: the bytes of its image file.
        label: its class.
    """

    blob: bytes
    label: int


class Examples(Protocol):
    """The examples of a split, by number. It goes to worker processes: it must pickle."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, index: int) -> Encoded:
        """Reads one.

        Raises:
            OSError: where its file cannot be read.
            DataError: where the whole data set is damaged.
        """
        ...

    def name(self, index: int) -> str:
        """What to call one, to find it again."""
        ...


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of the examples of another split.

    Attributes:
        examples: of the other split.
        indices: int `[N]`, their numbers there.
    """

    examples: Examples
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Encoded:
        """As `Examples.read`."""
        return self.examples.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """As `Examples.name`."""
        return self.examples.name(int(self.indices[index]))
