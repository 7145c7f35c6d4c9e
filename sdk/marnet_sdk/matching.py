"""Texts beside images: `Matching`, whose methods `Classifier` has."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock

import numpy as np

from marnet_sdk.alignment import product
from marnet_sdk.arguments import positive
from marnet_sdk.backends.guarded import Guarded
from marnet_sdk.bundle import Bundle
from marnet_sdk.inputs.batches import in_chunks, is_single
from marnet_sdk.inputs.images import ImageInput, Limits
from marnet_sdk.inputs.preprocess import Preprocess
from marnet_sdk.noise.tables import Floats
from marnet_sdk.process import left_to_the_parent, native
from marnet_sdk.run import Runner
from marnet_sdk.text import TextEmbedder, check_texts, open_text_part


class Matching:
    """Embeds texts, and scores how well they fit images."""

    bundle: Bundle
    preprocess: Preprocess
    limits: Limits
    _guard: Guarded
    _run: Runner
    _threads: int | None
    _device: str
    _text: TextEmbedder | None
    _text_lock: Lock

    def match(
        self,
        images: ImageInput | Iterable[ImageInput],
        texts: str | Iterable[str],
        *,
        batch_size: int = 64,
    ) -> Floats:
        """Score how well texts fit images: Sim(x_v', x_s') of eq. (5), the cosine of the angle
        between the aligned embeddings of image and text.

        1 is the best there is and -1 the worst. Only scores of one bundle can be compared. The
        first text that a classifier meets loads the text encoder, which is checked and tested then.
        A `MarnetWarning` says of how many texts most words are unknown to the model.

        Args:
            images: one image or many, as `predict` takes them.
            texts: one text, or many.
            batch_size: images, and texts, that go through their encoder together.

        Returns:
            [images, texts], without the first axis for one image (not in a list), without the last
            for one text; for one image and one text a number.

        Raises:
            ImageError: names the first input that is not a usable image.
            InvalidInput: a text that is no str, or has no word that the model knows; names it.
            InferenceError: an encoder gives NaN or infinity.
            BundleFormatError: the bundle has no text encoder; names the command that makes one.
            BundleCorrupt, MissingExtra, BackendUnavailable, SelfTestFailed: its text encoder
                cannot be used here.
        """
        self._guard.check()
        batch_size = positive("batch_size", batch_size)
        checked, one_text = check_texts(texts)
        embedder = self._embedder()
        with native():
            semantic = embedder(checked, batch_size)  # [M, D]
        one_image = is_single(images)
        chunks = [([images], ["the image"])] if one_image else in_chunks(images, batch_size)
        parts = [np.empty((0, len(checked)), np.float32)]
        for chunk, names in chunks:
            known = None if one_image else names
            pixels = self.preprocess.pixels(chunk, names=known, limits=self.limits)
            x_v = self._run.encode(pixels, names)
            parts.append(product(embedder.alignment.images(x_v), semantic))
        scores = np.concatenate(parts)
        if one_text:
            scores = scores[:, 0]
        return scores[0] if one_image else scores

    def embed_text(self, texts: str | Iterable[str], *, batch_size: int = 64) -> Floats:
        """Aligned text embeddings x_s' = g(E_s(x_s)), eq. (8), scaled to length 1, so that the dot
        product of two is their cosine similarity.

        Longer texts than the model was trained with are cut, as in training. Behind 1,024
        characters for each token that it takes, no text is looked at.

        Returns:
            [D] for one text, [texts, D] for many.

        Raises:
            InvalidInput, InferenceError, BundleFormatError, BundleCorrupt, MissingExtra,
                BackendUnavailable, SelfTestFailed: for the reasons that `match` has.
        """
        self._guard.check()
        batch_size = positive("batch_size", batch_size)
        checked, one = check_texts(texts)
        embedder = self._embedder()
        with native():
            embedded = embedder(checked, batch_size)
        return embedded[0] if one else embedded

    def _embedder(self) -> TextEmbedder:
        """The text encoder, opened at the first call."""
        with native(), self._text_lock:
            if self._text is None:
                self._text = left_to_the_parent(
                    open_text_part(self.bundle, self._threads, self._device)
                )
            return self._text
