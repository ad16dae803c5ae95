"""The reference and an artifact with fewer tokens on one clip, where the same tokens leave in both.

Which tokens leave is decided by comparing numbers, and numbers that are nearly equal compare otherwise in another
arithmetic: both choices are as good, but their answers differ by more than rounding does. So an artifact is compared
with the reference that follows its decisions, and its decisions are compared with the reference's own by what they are
worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from edgetube.bench import layers
from edgetube.bench.remembering import Answering
from edgetube.bundle import Bundle
from edgetube.errors import ParityError
from edgetube.precision import Precision
from edgetube.roles import LOGITS, GraphRoles, roles_of
from edgetube.runtimes.base import Backend, Logits, Tap
from edgetube.video import Frames

REGRET: Mapping[Precision, float] = {
    Precision.FP32: 1e-4,
    Precision.FP16: 0.02,
    Precision.W8: 0.02,
    Precision.W8A8: 0.05,
    Precision.W8A16: 0.05,
    Precision.W4: 0.05,
}
"""By how much the tokens that leave may be worse than the reference's own choice: mean cosine of merged pairs, or share
of the attention that those which stay receive, in any block of any clip."""


class Paired(Protocol):
    """The reference and an artifact, each clip answered by both.

    Attributes:
        alike: whether the same tokens leave in both.
        regret: the largest so far; None where it is not known.
    """

    alike: bool
    regret: float | None

    def __call__(self, clip: Frames, /) -> tuple[Logits, Logits]:
        """Logits (classes,) of both for a clip (T, H, W, 3) uint8."""


class Apart:
    """Both answer for themselves."""

    regret: float | None = None

    def __init__(self, reference: Answering, artifact: Answering, alike: bool = True) -> None:
        self.reference, self.artifact, self.alike = reference, artifact, alike

    def __call__(self, clip: Frames, /) -> tuple[Logits, Logits]:
        return self.reference(clip[None])[0], self.artifact(clip[None])[0]


class Shows(Protocol):
    """What shows the decisions and the logits of an artifact; `batch` clips at a time."""

    batch: int

    def tap(self, names: Sequence[str], /) -> Tap:
        """See `edgetube.runtimes.base.Backend.tap`."""


class Following:
    """The reference follows the artifact's decisions.

    Args:
        shows: the artifact, or a witness: another build of it, which shows what it decides.
        artifact: whose logits are compared where `shows` is a witness. If the two decide differently, they differ.
    """

    alike = True

    def __init__(self, reference: Backend, shows: Shows, roles: GraphRoles, artifact: Answering | None = None) -> None:
        self._reference, self._batch, self._artifact = reference, shows.batch, artifact
        self._tap, self._truth = shows.tap([*roles.decisions, LOGITS]), reference.tap([*roles.regrets, LOGITS])
        self.regret: float | None = None

    def __call__(self, clip: Frames, /) -> tuple[Logits, Logits]:
        shown = layers.read(self._tap, self._batch, clip)
        logits = shown.pop(LOGITS)[0]
        if self._artifact is not None:
            logits = self._artifact(clip[None])[0]
        with layers.followed(self._reference, shown):
            try:
                found = layers.read(self._truth, self._reference.batch, clip)
            except (IndexError, RuntimeError) as error:  # PyTorch's, of an index that is out of range
                raise ParityError(
                    "what the artifact says of the tokens that leave is no index of one: its artifact or runtime is "
                    "broken; export it again"
                ) from error
        expected = found.pop(LOGITS)[0]
        self.regret = float(np.max([self.regret or 0.0, *map(np.max, found.values())]))  # NaN stays
        return expected, logits


def pair(
    reference: Backend,
    backend: Backend,
    bundle: Bundle,
    answers: tuple[Answering, Answering],
    witness: Shows | None = None,
) -> Paired:
    """How an artifact is compared with the reference that has as many tokens; another artifact cannot follow it.

    Args:
        answers: of the two, where they need not be asked again.
        witness: another build of the artifact, which shows what it decides, where its own runtime does not.
    """
    roles = roles_of(bundle.spec)
    if not roles.decisions:
        return Apart(*answers)
    if not isinstance(reference, layers.Follower):
        return Apart(*answers, alike=False)
    if shows_decisions(backend, bundle):
        return Following(reference, backend, roles)
    return Apart(*answers, alike=False) if witness is None else Following(reference, witness, roles, answers[1])


def shows_decisions(backend: Backend, bundle: Bundle) -> bool:
    """Whether a backend shows which tokens leave, and the logits."""
    wanted = (*roles_of(bundle.spec).decisions, LOGITS)
    return set(backend.layers(wanted)) >= set(wanted)
