"""A classifier that many callers share while its bundle is replaced by another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock

from marnet_sdk.classifier import Classifier
from marnet_sdk.errors import ClassifierClosed


class _Held:
    """A classifier, and how many callers use it."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.users = classifier, 0


class Deployment:
    """Lends the classifier of the newest bundle to its callers.

        deployment = Deployment(lambda: Classifier("bundles/current.marnet"))
        with deployment.using() as classifier:
            classifier.predict("digit.png")
        deployment.reload()  # of another thread, once the link points to another bundle

    All that a caller asks for in one block is answered by one bundle, whose digest is
    `classifier.bundle.digest`. May be used from several threads at once.
    """

    def __init__(self, open_classifier: Callable[[], Classifier]) -> None:
        """Open the first classifier; raises what `open_classifier` raises."""
        self._open = open_classifier
        self._changed, self._one_at_a_time = Condition(), Lock()
        self._closed = False
        self._held = _Held(self._opened())

    @contextmanager
    def using(self) -> Iterator[Classifier]:
        """Lend the classifier to the block.

        It is not closed before the block ends, and then answers what it has accepted: futures of
        `Classifier.submit` may be waited for outside.

        Raises:
            ClassifierClosed: after `close`.
        """
        with self._changed:
            if self._closed:
                raise _closed()
            held = self._held
            held.users += 1
        try:
            yield held.classifier
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def reload(self) -> str:
        """Open another classifier beside the one that answers, and let it take over.

        It has passed its self-test, and has answered the golden images one by one, before callers
        get it. Returns once the old one has answered what it accepted and is closed. So a block of
        `using` must not call it. For that time both are in memory. Several calls run one after
        another.

        Returns:
            The digest of the bundle that answers from now on.

        Raises:
            ClassifierClosed: after `close`.
            MarnetError: what `open_classifier` raises; the old classifier stays.
        """
        with self._one_at_a_time:
            other = fresh = _Held(self._opened())
            with self._changed:
                if not (closed := self._closed):
                    self._held, other = fresh, self._held
            self._retire(other)
        if closed:
            raise _closed()
        return fresh.classifier.bundle.digest

    def close(self) -> None:
        """Refuse other callers, and close the classifier once those who use it are done."""
        with self._changed:
            self._closed, held = True, self._held
        self._retire(held)

    def _opened(self) -> Classifier:
        classifier = self._open()
        for path in classifier.bundle.golden_images():  # the first calls are slow
            classifier.predict(path)
        return classifier

    def _retire(self, held: _Held) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not held.users)
        held.classifier.close()


def _closed() -> ClassifierClosed:
    return ClassifierClosed("this Deployment is closed; make another one")
