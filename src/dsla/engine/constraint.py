"""What ties an answer to a grammar, as the engine sees it: which tokens may come next. The engine knows no grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenConstraint(Protocol):
    """Says which tokens may come next in the output of one request, which owns it.

    It is asked only where a token is chosen, so a request that is replayed asks nothing twice.
    """

    def allowed(self, output: Sequence[int]) -> NDArray[np.bool_]:
        """Tokens that may come next; end tokens among them where the output may end.

        Args:
            output: all tokens generated so far; it grows from call to call.

        Returns:
            `[vocab]`.

        Raises:
            EngineError: it cannot say.
        """
