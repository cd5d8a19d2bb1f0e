"""MobileSAM: kornia's Segment Anything with a TinyViT as its encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, overload

import torch
from kornia.models.sam import Sam
from kornia.models.sam.architecture.prompt_encoder import PositionEmbeddingRandom, PromptEncoder
from kornia.models.sam.architecture.transformer import TwoWayTransformer
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import Checkpoint, CheckpointError, load_checkpoint, open_pretrained, read_checkpoint
from kornia_tinyvit.checkpoints.adaptation import check_state_dict
from kornia_tinyvit.checkpoints.catalog import find_weights
from kornia_tinyvit.config import MIN_IMAGE_SIZE, TinyViTConfig
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.model import NECK_CHANNELS, TinyViT
from kornia_tinyvit.preprocessing import check_counts
from kornia_tinyvit.sam.decoder import SharingMaskDecoder
from kornia_tinyvit.sam.embedding import STRIDE, Geometry, ImageEmbedding, MaskPrediction, fingerprint
from kornia_tinyvit.sam.generator import Mask, MaskGenerator
from kornia_tinyvit.sam.prompter import MobileSAMPrompter
from kornia_tinyvit.sam.prompts import PromptInput, prepare_prompts, split_prompts
from kornia_tinyvit.sam.transforms import ImageLike, list_images, open_image, preprocess_image

__all__ = ["MobileSAM"]

_ENCODER = "image_encoder."


class MobileSAM(Sam):
    """MobileSAM (arXiv:2306.14289): SAM's prompt encoder and mask decoder, kornia's, over the features of a TinyViT.

    Its ``state_dict`` has the names and shapes of the published ``mobile_sam.pt``, which are also those of
    ``kornia.models.sam.Sam.from_config(SamConfig("mobile_sam"))``. :meth:`forward` is kornia's: it takes inputs as
    :meth:`preprocess` makes them, with prompts in pixels of the input. :meth:`embed` and :meth:`predict_masks` take
    photos, and prompts in pixels of the photo.

    ``save_checkpoint(sam, path)`` writes a safetensors file that :meth:`from_config` reads.

    Args:
        image_encoder: a TinyViT with ``mobile_sam=True``.
        img_size: height and width in pixels of the input, multiples of 16; a number for a square. That of the encoder
            if left out. Position codes are relative to the longer side, so a cell of an oblong input has the code of
            its place in the square.

    Raises:
        ValueError: if the encoder has no neck, or the size is not a multiple of 16 from 32 up.

    Example:
        >>> sam = MobileSAM.from_config("1m", img_size=64).eval()
        >>> embedding = sam.embed(torch.rand(3, 48, 80))
        >>> (found,) = sam.predict_masks(embedding, boxes=torch.tensor([[10.0, 5.0, 60.0, 40.0]]))
        >>> found.masks().shape, found.scores.shape
        (torch.Size([1, 3, 48, 80]), torch.Size([1, 3]))
    """

    def __init__(self, image_encoder: TinyViT, img_size: int | tuple[int, int] | None = None) -> None:
        if not image_encoder.config.mobile_sam or image_encoder.config.in_chans != 3:
            raise ValueError("MobileSAM needs an encoder of color images built with mobile_sam=True.")
        size = _check_size(image_encoder.config.img_size if img_size is None else img_size)
        super().__init__(image_encoder, _build_prompt_encoder(size), _build_mask_decoder())  # type: ignore[arg-type]
        self.img_size = size

    @classmethod
    def from_config(  # type: ignore[override]
        cls,
        config: str | TinyViTConfig | None = None,
        *,
        pretrained: bool | str | Path | Mapping[str, Any] = False,
        img_size: int | tuple[int, int] | None = None,
    ) -> MobileSAM:
        """Build MobileSAM with any variant as its encoder, with or without weights.

        Args:
            config: ``"1m"``, ``"5m"`` (the published one), ``"11m"``, ``"21m"`` or a
                :class:`~kornia_tinyvit.TinyViTConfig`; if left out, that of the weights, else ``"5m"``.
            pretrained: ``True`` or ``"mobile_sam"`` for the published weights, downloaded once; or path, URL or state
                dict of a whole model, of this class, of kornia or of the original code. Only tensors are read: a file
                that would have to run code is refused.
            img_size: height and width in pixels of the input, multiples of 16; a number for a square. That of the
                weights if left out, else 1024. The published weights were made at 1024; smaller inputs take less time
                in proportion to their area and lose small objects and fine borders.

        Returns:
            The network, in evaluation mode if weights were loaded, in training mode otherwise, as in kornia.

        Raises:
            ValueError: if the variant or the size is unknown.
            CheckpointError: if the weights cannot be fetched or read, or are not those of this whole network.
        """
        found = None
        if pretrained is not False:
            found = _open_whole(pretrained, config)
            base = found.config
        else:
            base = config if isinstance(config, TinyViTConfig) else TinyViTConfig.from_variant(config or "5m")
            base = base.replace(img_size=1024)
        size = _check_size(base.img_size if img_size is None else img_size)
        model = cls(TinyViT.from_config(base.replace(mobile_sam=True, img_size=max(size))), size)
        if found is not None:
            parts = {name: x for name, x in model.state_dict().items() if not name.startswith(_ENCODER)}
            check_state_dict(found.others, parts, found.source)  # before the network is touched
            load_checkpoint(model.image_encoder, found)
            model.load_state_dict(found.others, strict=False)
            model.eval()
        return model

    @staticmethod
    def from_name(name: str) -> MobileSAM:
        """Build a variant with random weights, as :meth:`from_config` does."""
        return MobileSAM.from_config(name)

    @property
    def config(self) -> TinyViTConfig:
        """The configuration of the encoder, which files carry."""
        return self.image_encoder.config  # type: ignore[return-value]

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> tuple[Tensor, tuple[Geometry, ...]]:
        """Resize photos as a whole, normalize them, and pad them below and on the right with zeros.

        Files and PIL images are resized by Pillow in 8 bits, bilinear with antialiasing, exactly as the predictors of
        segment-anything and MobileSAM do (``ResizeLongestSide.apply_image``). Tensors are resized by torch in floating
        point, with gradients, as ``apply_image_torch`` does and kornia's ``VisualPrompter`` too: up to a level of 255
        away. ``VisualPrompter`` cuts the fraction of the short side off, where the originals and this round it.

        Args:
            images: one photo or several: files, which are turned upright, PIL images, tensors :math:`(3, H, W)` in
                [0, 1], or a batch tensor :math:`(B, 3, H, W)`.

        Returns:
            Inputs of the encoder :math:`(B, 3, h, w)`, on its device and in its precision, and how each photo lies in
            its input.

        Raises:
            TypeError: if something is no photo, or its tensor is not floating point.
            ValueError: if a file cannot be read, a tensor has another shape, no pixels, NaN or infinity.
            FileNotFoundError: if there is no such file.
        """
        return self._prepare([open_image(image) for image in list_images(images)])

    def embed(self, images: ImageLike | Sequence[ImageLike], batch_size: int = 4) -> ImageEmbedding:
        """Run the encoder on photos, once for any number of prompts.

        No gradient is recorded, and the encoder is in evaluation mode, unless gradients are enabled and it is being
        trained or a photo requires a gradient.

        Args:
            images: photos as :meth:`preprocess` takes them, of any sizes.
            batch_size: photos at a time; all of them when gradients are recorded.

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
        photos = list_images(images)
        step = max(1, len(photos)) if _records(self.image_encoder, *photos) else batch_size
        starts = range(0, max(1, len(photos)), step)
        encoded = [self._encode([open_image(each) for each in photos[start : start + step]]) for start in starts]
        features, geometries = zip(*encoded, strict=True)
        return ImageEmbedding(torch.cat(features), sum(geometries, ()), fingerprint(self.image_encoder))

    def embed_pixels(self, pixels: Sequence[Tensor]) -> ImageEmbedding:
        """Run the encoder once on photos that are tensors already, :meth:`embed` without opening and batches.

        Args:
            pixels: photos :math:`(3, H, W)`, uint8 or floating point in [0, 1].

        Returns:
            The embeddings of all images.
        """
        return ImageEmbedding(*self._encode(pixels), fingerprint(self.image_encoder))

    def predict_masks(
        self,
        embedding: ImageEmbedding,
        points: PromptInput = None,
        labels: PromptInput = None,
        boxes: PromptInput = None,
        masks: PromptInput = None,
        multimask_output: bool = True,
    ) -> list[MaskPrediction]:
        """Find what prompts point at.

        A photo may have any number of prompts :math:`P`, also 0. A prompt is made of :math:`N` points, a box, a mask,
        or several of these, the same for all of a photo's prompts. For a single photo the arguments are tensors; for
        several, lists with a tensor or ``None`` each.

        Gradients are recorded, by kornia's decoder, if they are enabled and the decoder is being trained or the
        embedding or a prompt requires one. Otherwise prompts share the work on their photo
        (:class:`~kornia_tinyvit.sam.FoldedMaskDecoder`): the same results in less time. So they do under
        :meth:`forward` and :meth:`prompter`.

        Args:
            embedding: what :meth:`embed` returned, here or before in a file.
            points: :math:`(P, N, 2)`, x and y in pixels of the photo, from 0 to its width and height.
            labels: :math:`(P, N)`: 1 for points on the object, 0 off it, -1 for a place that holds no point; all 1 if
                left out.
            boxes: :math:`(P, 4)`, left, top, right and bottom in pixels of the photo. They may jut out of it.
            masks: logits :math:`(P, 1, h/4, w/4)` of an earlier prediction to refine.
            multimask_output: three masks a prompt, for prompts that may mean several things, such as a single point;
                otherwise one.

        Returns:
            For each photo its masks, on the device of the network.

        Raises:
            TypeError: if prompts are no tensors.
            ValueError: if the embedding is of other weights or another input size, all prompts of a photo are
                ``None``, or a prompt's shape or place is wrong: outside of the photo, empty, NaN.
        """
        self.check_embedding(embedding)
        kinds = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
        given = [split_prompts(kind, prompts, len(embedding)) for kind, prompts in kinds.items()]
        first = next(self.mask_decoder.parameters())
        found = []
        for one, *tensors in zip(embedding, *given, strict=True):
            on_device = [None if each is None else each.to(first.device) for each in tensors]
            prompts = prepare_prompts(one.geometries[0], *on_device)
            masks = None if prompts.masks is None else prompts.masks.to(first.dtype)
            features, position = one.features.to(first.device, first.dtype), self.prompt_encoder.get_dense_pe()
            with torch.set_grad_enabled(_records(self.mask_decoder, self.prompt_encoder, one.features, *on_device)):
                prompt = self.prompt_encoder(points=prompts.points, boxes=prompts.boxes, masks=masks)
                logits, scores = self.mask_decoder(features, position, *prompt, multimask_output)
            found.append(MaskPrediction(logits, scores, one.geometries[0], self.mask_threshold))
        return found

    def predict_best(
        self, embedding: ImageEmbedding, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None
    ) -> MaskPrediction:
        """Find the one mask that each prompt of a photo most likely means.

        A single point may mean a part or the whole, so three masks are asked for and the best is kept. More than that
        is unambiguous, and a single mask is better then.

        Args:
            embedding: of one photo.
            points, labels, boxes: as :meth:`predict_masks` takes them for a single photo.

        Returns:
            The masks, :math:`M = 1`.

        Raises:
            ValueError: as :meth:`predict_masks`, or if the embedding is of several photos.
        """
        several = boxes is None and points is not None and points.shape[1] == 1
        (found,) = self.predict_masks(embedding, points, labels, boxes, multimask_output=several)
        return found.best()

    @overload
    def generate_masks(self, image: ImageLike, **settings: Any) -> list[Mask]: ...

    @overload
    def generate_masks(self, image: Sequence[ImageLike] | ImageEmbedding, **settings: Any) -> list[list[Mask]]: ...

    def generate_masks(
        self, image: ImageLike | Sequence[ImageLike] | ImageEmbedding, **settings: Any
    ) -> list[Mask] | list[list[Mask]]:
        """Segment everything in a photo, or in each of several.

        The masks are those of segment-anything's ``SamAutomaticMaskGenerator`` on the same weights with the same
        settings, in the same order. Candidates take up to a quarter of a megabyte each until duplicates are removed;
        for what is returned see ``output_mode``.

        Args:
            image: a photo as :meth:`embed` takes it; several of these in a sequence, in a tensor
                :math:`(B, 3, H, W)` or an array :math:`(B, H, W, 3)`; or what :meth:`embed` returned, here or before
                in a file, which saves the encoder. Files, PIL images and arrays are resized exactly as
                segment-anything does it.
            **settings: those of :class:`~kornia_tinyvit.sam.MaskGenerator`.

        Returns:
            The masks of a photo, the best first within a crop; of several photos or an embedding, a list of these, one
            for each photo.

        Raises:
            TypeError: if the image is of no kind that is known.
            ValueError: if a setting is out of its range, the image has no pixels or another shape, or an embedding is
                of other weights, of another input size, or given with crop layers, which need the photo.

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
        """Refuse an embedding that this network cannot read.

        Args:
            embedding: the embedding.

        Raises:
            ValueError: if it is of another input size, or made by an encoder with other weights.
        """
        sizes = {geometry.img_size for geometry in embedding.geometries} - {self.img_size}
        if sizes:
            raise ValueError(f"The embedding is of inputs of {sizes.pop()} pixels; this network has {self.img_size}.")
        mine = fingerprint(self.image_encoder)
        if None not in (embedding.encoder, mine) and embedding.encoder != mine:
            raise ValueError(
                "The embedding was made by an encoder with other weights, or in another precision; embed the photos "
                "again with this network."
            )

    def prompter(self) -> MobileSAMPrompter:
        """Return kornia's prompter over this very network; its image conventions are told in :meth:`preprocess`.

        Raises:
            ValueError: if the input is not square, which the prompter's always is.
        """
        return MobileSAMPrompter(self)

    def extra_repr(self) -> str:
        """Show the input size."""
        return f"img_size={self.img_size}"

    def _prepare(self, pixels: Sequence[Tensor]) -> tuple[Tensor, tuple[Geometry, ...]]:
        """Return inputs :math:`(B, 3, h, w)` of photos and how each lies in its input."""
        first = next(self.parameters())
        if not pixels:
            return first.new_zeros(0, 3, *self.img_size), ()
        prepared = [preprocess_image(each, self.img_size, first.device, first.dtype) for each in pixels]
        return torch.stack([inputs for inputs, _ in prepared]), tuple(geometry for _, geometry in prepared)

    def _encode(self, pixels: Sequence[Tensor]) -> tuple[Tensor, tuple[Geometry, ...]]:
        """Return features :math:`(B, 256, h/16, w/16)` of photos and how each lies in its input."""
        recording = _records(self.image_encoder, *pixels)
        # Not inference mode: a decoder that is being trained must be able to keep the features for its gradient.
        with nullcontext() if recording else evaluating(self.image_encoder), torch.set_grad_enabled(recording):
            inputs, geometries = self._prepare(pixels)
            return self.image_encoder(inputs), geometries


class _SquarePositions(PositionEmbeddingRandom):
    """SAM's position code, relative to the longer side.

    kornia divides x by the width and y by the height. The published weights know squares only, so in an oblong input
    distances across and down would have other codes than they learned.
    """

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Return the codes of a map of cells, :math:`(C, h, w)`."""
        height, width = size
        return super().forward((max(size), max(size)))[:, :height, :width]

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Return the codes :math:`(P, N, C)` of points in pixels of the input."""
        return super().forward_with_coords(coords_input, (max(image_size), max(image_size)))


def _open_whole(pretrained: bool | str | Path | Mapping[str, Any], config: str | TinyViTConfig | None) -> Checkpoint:
    """Read the weights of a whole model, of the architecture that was asked for."""
    source: str | Path | Checkpoint
    if isinstance(pretrained, Mapping):
        source = read_checkpoint(pretrained)
    else:
        source = "mobile_sam" if pretrained is True else str(pretrained)
    if source == "mobile_sam" and isinstance(config, str) and find_weights(config, source) is None:
        raise CheckpointError(
            f"MobileSAM is published with a 5m encoder, not with {config}; leave the variant out, or pass a file of "
            "your own as pretrained=."
        )
    found = open_pretrained(source, config)
    if found.layout != "mobile_sam":
        raise CheckpointError(f"{found.source} holds a TinyViT alone, without SAM's prompt encoder and mask decoder.")
    return found


def _build_prompt_encoder(size: tuple[int, int]) -> PromptEncoder:
    cells = (size[0] // STRIDE, size[1] // STRIDE)
    encoder = PromptEncoder(NECK_CHANNELS, image_embedding_size=cells, input_image_size=size, mask_in_chans=16)
    encoder.pe_layer = _SquarePositions(NECK_CHANNELS // 2)
    return encoder


def _build_mask_decoder() -> SharingMaskDecoder:
    """Return the decoder that all SAMs share (``build_sam.py`` of segment-anything)."""
    transformer = TwoWayTransformer(depth=2, embedding_dim=NECK_CHANNELS, mlp_dim=2048, num_heads=8)
    return SharingMaskDecoder(transformer_dim=NECK_CHANNELS, transformer=transformer)


def _check_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    whole = all(isinstance(side, int) and side >= MIN_IMAGE_SIZE and side % STRIDE == 0 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(
            f"img_size must be a multiple of {STRIDE} from {MIN_IMAGE_SIZE} up, or two for height and width; got "
            f"{img_size!r}."
        )
    return sides[0], sides[1]


def _records(*parts: Any) -> bool:
    """Tell whether gradients are to be recorded: a module is being trained, or a tensor requires one."""
    return torch.is_grad_enabled() and any(
        part.training if isinstance(part, nn.Module) else isinstance(part, Tensor) and part.requires_grad
        for part in parts
    )
