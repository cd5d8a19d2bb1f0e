"""MobileSAM: kornia's Segment Anything with a TinyViT image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from kornia.models.sam import Sam
from kornia.models.sam.architecture.prompt_encoder import PositionEmbeddingRandom, PromptEncoder
from kornia.models.sam.architecture.transformer import TwoWayTransformer
from numpy.typing import NDArray
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import Checkpoint, CheckpointError, load_checkpoint, open_pretrained, read_checkpoint
from kornia_tinyvit.checkpoints.adaptation import check_state_dict
from kornia_tinyvit.checkpoints.catalog import find_weights
from kornia_tinyvit.config import MIN_IMAGE_SIZE, TinyViTConfig
from kornia_tinyvit.images import ImageInput, Images, list_images, open_image
from kornia_tinyvit.model import NECK_CHANNELS, TinyViT
from kornia_tinyvit.modules import evaluation_copy, unwrapped
from kornia_tinyvit.preprocessing import check_counts
from kornia_tinyvit.sam.decoder import SharingMaskDecoder
from kornia_tinyvit.sam.embedding import STRIDE, Geometry, ImageEmbedding, MaskPrediction, fingerprint
from kornia_tinyvit.sam.generator import Mask, MaskGenerator
from kornia_tinyvit.sam.prompter import MobileSAMPrompter
from kornia_tinyvit.sam.prompts import PromptInput, prepare_prompts, split_prompts
from kornia_tinyvit.sam.transforms import preprocess_image

__all__ = ["MobileSAM"]

_ENCODER = "image_encoder."


class MobileSAM(Sam):
    """MobileSAM (arXiv:2306.14289): kornia's SAM prompt encoder and mask decoder with a TinyViT image encoder.

    The ``state_dict`` has the names and shapes of the published ``mobile_sam.pt``, which are also those of
    ``kornia.models.sam.Sam.from_config(SamConfig("mobile_sam"))``. :meth:`forward` is kornia's: it takes model inputs
    from :meth:`preprocess` and prompts in pixels of the input. :meth:`embed` and :meth:`predict_masks` take images,
    and prompts in pixels of the image.

    ``save_checkpoint(sam, path)`` writes a safetensors file that :meth:`from_config` reads.

    Args:
        image_encoder: a TinyViT with ``mobile_sam=True``.
        img_size: height and width of the model input in pixels, multiples of 16, or an int for a square; default that
            of the encoder. Position embeddings are relative to the longer side: those of a rectangular input are a
            crop of the square's.

    Raises:
        ValueError: if the encoder has no neck, or the size is not a multiple of 16 of at least 32.

    Example:
        >>> sam = MobileSAM.from_config("1m", img_size=64).eval()
        >>> embedding = sam.embed(torch.rand(3, 48, 80))
        >>> (prediction,) = sam.predict_masks(embedding, boxes=torch.tensor([[10.0, 5.0, 60.0, 40.0]]))
        >>> prediction.masks().shape, prediction.scores.shape
        (torch.Size([1, 3, 48, 80]), torch.Size([1, 3]))
    """

    def __init__(self, image_encoder: TinyViT, img_size: int | tuple[int, int] | None = None) -> None:
        if not image_encoder.config.mobile_sam or image_encoder.config.in_chans != 3:
            raise ValueError("MobileSAM needs an image encoder with 3 input channels and mobile_sam=True.")
        size = _check_size(image_encoder.config.img_size if img_size is None else img_size)
        cells = (size[0] // STRIDE, size[1] // STRIDE)
        prompt_encoder = PromptEncoder(NECK_CHANNELS, cells, size, mask_in_chans=16)
        prompt_encoder.pe_layer = _SquarePositions(NECK_CHANNELS // 2)
        # Sizes of build_sam.py of segment-anything.
        transformer = TwoWayTransformer(depth=2, embedding_dim=NECK_CHANNELS, mlp_dim=2048, num_heads=8)
        mask_decoder = SharingMaskDecoder(transformer_dim=NECK_CHANNELS, transformer=transformer)
        super().__init__(image_encoder, prompt_encoder, mask_decoder)  # type: ignore[arg-type]
        self.img_size = size

    @classmethod
    def from_config(  # type: ignore[override]
        cls,
        config: str | TinyViTConfig | None = None,
        *,
        pretrained: bool | str | Path | Mapping[str, Any] | Checkpoint = False,
        img_size: int | tuple[int, int] | None = None,
    ) -> MobileSAM:
        """Build MobileSAM with any variant as its image encoder, with or without weights.

        Args:
            config: ``"1m"``, ``"5m"`` (the published one), ``"11m"``, ``"21m"`` or a
                :class:`~kornia_tinyvit.TinyViTConfig`; default that of the weights, else ``"5m"``.
            pretrained: ``True`` or ``"mobile_sam"`` for the published weights, downloaded once; or a path, URL,
                state dict or :class:`~kornia_tinyvit.checkpoints.Checkpoint` of a whole model, of this class, of kornia
                or of the original code. Only tensors are read; code in a file is never run.
            img_size: height and width of the model input in pixels, multiples of 16, or an int for a square; default
                that of the weights, else 1024. The published weights were trained at 1024; the time of the encoder is
                proportional to the area, and smaller inputs lose small objects and fine borders.

        Returns:
            The network, in evaluation mode with weights, in training mode without.

        Raises:
            ValueError: if the variant or the size is unknown.
            CheckpointError: if the weights cannot be downloaded or read, or do not match the whole network.
        """
        checkpoint = None if pretrained is False else _open_model(pretrained, config)
        if checkpoint is not None:
            base = checkpoint.config
        else:
            base = config if isinstance(config, TinyViTConfig) else TinyViTConfig.from_variant(config or "5m")
            base = base.replace(img_size=1024)
        size = _check_size(base.img_size if img_size is None else img_size)
        model = cls(TinyViT.from_config(base.replace(mobile_sam=True, img_size=max(size))), size)
        if checkpoint is not None:
            parts = {name: x for name, x in model.state_dict().items() if not name.startswith(_ENCODER)}
            check_state_dict(checkpoint.others, parts, checkpoint.source)  # before any weight is loaded
            load_checkpoint(model.image_encoder, checkpoint)
            model.load_state_dict(checkpoint.others, strict=False)
            model.eval()
        return model

    @staticmethod
    def from_name(name: str) -> MobileSAM:
        """Build a variant with random weights; see :meth:`from_config`."""
        return MobileSAM.from_config(name)

    @property
    def config(self) -> TinyViTConfig:
        """Configuration of the image encoder, stored in checkpoints."""
        return unwrapped(self.image_encoder).config

    def preprocess(self, images: Images) -> tuple[Tensor, tuple[Geometry, ...]]:
        """Resize images with their aspect ratio, normalize them, and pad them at the bottom and right with zeros.

        uint8 images (files, PIL images, arrays and tensors) are resized by Pillow, bilinear with antialiasing, exactly
        as ``ResizeLongestSide.apply_image`` of segment-anything and MobileSAM. Floating point and 16-bit images are
        resized in floating point by torch, differentiably, as ``apply_image_torch`` and kornia's ``VisualPrompter``;
        the results differ by up to 1/255. ``VisualPrompter`` truncates the short side; segment-anything and this method
        round it.

        Args:
            images: one image or several in any form that :func:`~kornia_tinyvit.images.open_image` takes: paths,
                encoded files, PIL images, arrays :math:`(H, W, 3)`, tensors :math:`(3, H, W)`, or a batch
                :math:`(B, 3, H, W)`.

        Returns:
            Model inputs :math:`(B, 3, h, w)`, on the device and in the dtype of the network, and the placement of
            each image in its input.

        Raises:
            TypeError: if an argument is not an image, or has another data type.
            ValueError: if a file cannot be read, a shape is wrong, or values are outside of [0, 1].
            FileNotFoundError: if a file does not exist.
        """
        first = next(self.parameters())
        pixels = [open_image(image) for image in list_images(images)]
        if not pixels:
            return first.new_zeros(0, 3, *self.img_size), ()
        prepared = [preprocess_image(each, self.img_size, first.device, first.dtype) for each in pixels]
        return torch.stack([inputs for inputs, _ in prepared]), tuple(geometry for _, geometry in prepared)

    def embed(self, images: Images, batch_size: int = 4) -> ImageEmbedding:
        """Compute image embeddings, once per image for any number of prompts.

        The encoder runs in evaluation mode and without gradients, unless gradients are enabled and the encoder is in
        training mode or an image requires a gradient.

        Args:
            images: images of any size, as in :meth:`preprocess`.
            batch_size: images per batch; with gradients all images are one batch.

        Returns:
            The embeddings of all images.

        Raises:
            TypeError, ValueError, FileNotFoundError: as :meth:`preprocess`.

        Example:
            >>> sam = MobileSAM.from_config("1m", img_size=64).eval()
            >>> sam.embed([torch.rand(3, 48, 80), torch.rand(3, 90, 60)]).features.shape
            torch.Size([2, 256, 4, 4])
        """
        check_counts(batch_size=batch_size)
        listed = list_images(images)
        step = max(1, len(listed)) if _records(self.image_encoder, *listed) else batch_size
        starts = range(0, max(1, len(listed)), step)
        parts = [self._embed_batch(listed[start : start + step]) for start in starts]
        features = torch.cat([part.features for part in parts])
        return ImageEmbedding(features, sum((part.geometries for part in parts), ()), parts[0].encoder)

    def _embed_batch(self, images: list[ImageInput]) -> ImageEmbedding:
        recording = _records(self.image_encoder, *images)
        encoder = self.image_encoder if recording else evaluation_copy(self.image_encoder)
        # no_grad, not inference mode: a decoder in training saves the features for its backward pass.
        with torch.set_grad_enabled(recording):
            inputs, geometries = self.preprocess(images)
            return ImageEmbedding(encoder(inputs), geometries, fingerprint(self.image_encoder))

    def predict_masks(
        self,
        embedding: ImageEmbedding,
        points: PromptInput = None,
        labels: PromptInput = None,
        boxes: PromptInput = None,
        masks: PromptInput = None,
        multimask_output: bool = True,
    ) -> list[MaskPrediction]:
        """Predict masks for point, box and mask prompts.

        Each image may have any number of prompts :math:`P`, including 0. A prompt combines :math:`N` points, a box
        and a mask, or some of these, the same for all prompts of an image. For a single image the arguments are
        tensors or arrays; for several, lists with one or ``None`` per image.

        Prompts share the computation on their image (see :class:`~kornia_tinyvit.sam.FoldedMaskDecoder`), also in
        :meth:`forward` and :meth:`prompter`. Gradients are recorded if they are enabled and the decoder is in training
        mode, or the embedding or a prompt requires one. Otherwise the network runs as in evaluation mode.

        Args:
            embedding: from :meth:`embed`, or loaded from a file.
            points: point prompts :math:`(P, N, 2)`, x and y in pixels of the image, from 0 to its width and height.
            labels: point labels :math:`(P, N)`: 1 foreground, 0 background, -1 padding; default all 1.
            boxes: box prompts :math:`(P, 4)`, left, top, right and bottom in pixels of the image; they may extend
                beyond it.
            masks: mask prompts, low-resolution logits :math:`(P, 1, h/4, w/4)` of an earlier prediction.
            multimask_output: predict three masks per prompt, for ambiguous prompts such as a single point; otherwise
                one.

        Returns:
            The masks of each image, on the device of the network.

        Raises:
            TypeError: if prompts are neither tensors nor arrays of numbers.
            ValueError: if the embedding has other encoder weights or another input size, an image has no prompts, or
                a prompt has a wrong shape, is empty, contains NaN or lies outside of the image.
        """
        self.check_embedding(embedding)
        kinds = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
        given = [split_prompts(kind, prompts, len(embedding)) for kind, prompts in kinds.items()]
        first = next(self.mask_decoder.parameters())
        predictions = []
        for one, *tensors in zip(embedding, *given, strict=True):
            on_device = [None if each is None else each.to(first.device) for each in tensors]
            prompts = prepare_prompts(one.geometries[0], *on_device)
            masks = None if prompts.masks is None else prompts.masks.to(first.dtype)
            features = one.features.to(first.device, first.dtype)
            recording = _records(self.mask_decoder, self.prompt_encoder, one.features, *on_device)
            encoder = self.prompt_encoder if recording else evaluation_copy(self.prompt_encoder)
            decoder = self.mask_decoder if recording else evaluation_copy(self.mask_decoder)
            with torch.set_grad_enabled(recording):
                prompt = encoder(points=prompts.points, boxes=prompts.boxes, masks=masks)
                logits, scores = decoder(features, encoder.get_dense_pe(), *prompt, multimask_output)
            predictions.append(MaskPrediction(logits, scores, one.geometries[0], self.mask_threshold))
        return predictions

    def predict_best(
        self,
        embedding: ImageEmbedding,
        points: Tensor | NDArray[Any] | None,
        labels: Tensor | NDArray[Any] | None,
        boxes: Tensor | NDArray[Any] | None,
    ) -> MaskPrediction:
        """Predict the most likely mask of each prompt of one image.

        A single point is ambiguous: of its three masks the one with the highest score is returned. Other prompts use
        the single-mask output.

        Args:
            embedding: embedding of one image.
            points, labels, boxes: as in :meth:`predict_masks` for a single image.

        Returns:
            The masks, :math:`M = 1`.

        Raises:
            ValueError: as :meth:`predict_masks`, or if the embedding has several images.
        """
        ambiguous = boxes is None and points is not None and points.shape[1] == 1
        (prediction,) = self.predict_masks(embedding, points, labels, boxes, multimask_output=ambiguous)
        return prediction.best()

    @overload
    def generate_masks(self, image: ImageInput, **settings: Any) -> list[Mask]: ...

    @overload
    def generate_masks(self, image: Sequence[ImageInput] | ImageEmbedding, **settings: Any) -> list[list[Mask]]: ...

    def generate_masks(self, image: Images | ImageEmbedding, **settings: Any) -> list[Mask] | list[list[Mask]]:
        """Segment everything in an image, or in each of several.

        Masks and their order are those of segment-anything's ``SamAutomaticMaskGenerator`` with the same weights and
        settings. Each candidate takes up to 256 KiB until non-maximum suppression; for the size of the result see
        ``output_mode``.

        Args:
            image: an image as in :meth:`embed`; a sequence of images, a tensor :math:`(B, 3, H, W)` or an array
                :math:`(B, H, W, 3)`; or an :class:`~kornia_tinyvit.sam.ImageEmbedding`, which skips the encoder.
            **settings: arguments of :class:`~kornia_tinyvit.sam.MaskGenerator`.

        Returns:
            The masks of the image, sorted by descending score within each crop; for several images or an embedding, a
            list of such lists, one per image.

        Raises:
            TypeError: if the argument is not an image or an embedding.
            ValueError: if a setting is out of range, the image has no pixels or a wrong shape, or an embedding has
                other encoder weights or another input size, or is combined with crop layers, which need the image.

        Example:
            >>> sam = MobileSAM.from_config("1m", img_size=64).eval()
            >>> masks = sam.generate_masks(torch.rand(3, 48, 80), points_per_side=2, stability_score_thresh=0)
            >>> [mask.segmentation.shape for mask in masks if mask.area > 48 * 80]
            []
            >>> len(sam.generate_masks(torch.rand(2, 3, 48, 80), points_per_side=2))
            2
        """
        return MaskGenerator(**settings)(self, image)

    def check_embedding(self, embedding: ImageEmbedding) -> None:
        """Check that an embedding was made by an encoder with the weights and input size of this network.

        Args:
            embedding: the embedding.

        Raises:
            ValueError: if the input size or the encoder weights differ.
        """
        sizes = {geometry.img_size for geometry in embedding.geometries} - {self.img_size}
        if sizes:
            raise ValueError(f"The embedding has input size {sizes.pop()}; this network has {self.img_size}.")
        expected = fingerprint(self.image_encoder)
        if None not in (embedding.encoder, expected) and embedding.encoder != expected:
            raise ValueError(
                "The embedding was made by an encoder with other weights or in another dtype. Embed the images again "
                "with this network."
            )

    def prompter(self) -> MobileSAMPrompter:
        """Return kornia's ``VisualPrompter`` over this network; for its preprocessing see :meth:`preprocess`.

        Raises:
            ValueError: if the model input is not square.
        """
        return MobileSAMPrompter(self)

    def extra_repr(self) -> str:
        """Show the input size."""
        return f"img_size={self.img_size}"


class _SquarePositions(PositionEmbeddingRandom):
    """SAM's position embedding, relative to the longer side.

    kornia divides x by the width and y by the height. The published weights were trained on squares; in a rectangular
    input that would change the embedding of distances along one axis.
    """

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Return the embeddings of a grid of cells, :math:`(C, h, w)`."""
        height, width = size
        return super().forward((max(size), max(size)))[:, :height, :width]

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Return the embeddings :math:`(P, N, C)` of points in pixels of the input."""
        return super().forward_with_coords(coords_input, (max(image_size), max(image_size)))


def _open_model(
    pretrained: bool | str | Path | Mapping[str, Any] | Checkpoint, config: str | TinyViTConfig | None
) -> Checkpoint:
    """Read a checkpoint of a whole model and check its architecture."""
    source: str | Path | Checkpoint
    if isinstance(pretrained, Mapping):
        source = read_checkpoint(pretrained)
    elif isinstance(pretrained, Checkpoint):
        source = pretrained
    else:
        source = "mobile_sam" if pretrained is True else str(pretrained)
    if source == "mobile_sam" and isinstance(config, str) and find_weights(config, source) is None:
        raise CheckpointError(
            f"MobileSAM is published with a 5m encoder, not with {config}. Omit the variant, or pass your own file as "
            "pretrained=."
        )
    checkpoint = open_pretrained(source, config)
    if checkpoint.layout != "mobile_sam":
        raise CheckpointError(f"{checkpoint.source} holds only a TinyViT, without prompt encoder and mask decoder.")
    return checkpoint


def _check_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    valid = all(isinstance(side, int) and side >= MIN_IMAGE_SIZE and side % STRIDE == 0 for side in sides)
    if len(sides) != 2 or not valid:
        raise ValueError(f"img_size must be a multiple of {STRIDE} >= {MIN_IMAGE_SIZE}, or two; got {img_size!r}.")
    return sides[0], sides[1]


def _records(*parts: Any) -> bool:
    """Return whether to record gradients: they are enabled, and a module is training or a tensor requires one."""
    return torch.is_grad_enabled() and any(
        part.training if isinstance(part, nn.Module) else isinstance(part, Tensor) and part.requires_grad
        for part in parts
    )
