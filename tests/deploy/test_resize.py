import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kornia_tinyvit.deploy.resize import ResizeAndCrop
from kornia_tinyvit.images import read_image
from kornia_tinyvit.preprocessing import EvaluationPipeline
from tests.conftest import shared

FRACTIONS = st.sampled_from([None, 0.875, 0.3, 1.0, "auto"])


def images(*shape: int) -> torch.Tensor:
    """Return noise with columns of black and white, where the kernel overshoots and is clamped."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return torch.where(torch.arange(shape[-1]) % 5 < 3, noise, noise.round())


class TestResizeAndCrop:
    @given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 48), FRACTIONS)
    @example(300, 40, 16, None)  # the height is resized first
    @example(40, 300, 16, 0.3)
    @example(1500, 37, 32, "auto")
    @example(48, 61, 48, 1.0)  # one side is not resized
    def test_equals_pipeline(self, height, width, size, crop_fraction):
        pipeline = EvaluationPipeline(size, crop_fraction)
        x = images(2, 3, height, width)
        found = ResizeAndCrop(pipeline)(x)
        torch.testing.assert_close(found, pipeline.resize_and_crop(x), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("shape", [(0, 3, 50, 40), (1, 1, 50, 40), (3, 4, 40, 50)])
    def test_cardinality(self, shape):
        assert ResizeAndCrop(EvaluationPipeline(32))(torch.rand(shape)).shape == (*shape[:2], 32, 32)

    def test_uint8(self):
        pipeline = EvaluationPipeline(32)
        x = torch.randint(256, (2, 3, 70, 90), dtype=torch.uint8)
        found = ResizeAndCrop(pipeline, max_value=255)(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found / 255, pipeline.resize_and_crop(x / 255), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, dtype):
        pipeline = EvaluationPipeline(32)
        x = images(1, 3, 50, 40).to(dtype)
        found = ResizeAndCrop(pipeline)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, pipeline.resize_and_crop(x))

    def test_photo(self):
        pipeline = EvaluationPipeline(224)
        photo = read_image(shared("data/coco128/images/train2017/000000000009.jpg"))[None]
        torch.testing.assert_close(ResizeAndCrop(pipeline)(photo), pipeline.resize_and_crop(photo), atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=["auto", None])
def exported(request):
    pipeline = EvaluationPipeline(32, request.param)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(ResizeAndCrop(pipeline).eval(), (torch.rand(2, 3, 60, 81),), dynamic_shapes=(sizes,))
    return pipeline, program.module()


class TestExport:
    @pytest.mark.parametrize("size", [(480, 640), (95, 64), (33, 90), (32, 32), (20, 31), (35, 32), (37, 32)])
    def test_any_size(self, exported, size):
        pipeline, program = exported
        x = images(3, 3, *size)
        torch.testing.assert_close(program(x), pipeline.resize_and_crop(x), atol=1e-4, rtol=0)

    def test_order_matters_only_where_values_are_clamped(self, exported):
        # The pipeline resizes the height first. Without black and white nothing is clamped, and both orders agree.
        pipeline, program = exported
        x = 0.3 + 0.4 * images(2, 3, 400, 60)
        torch.testing.assert_close(program(x), pipeline.resize_and_crop(x), atol=1e-4, rtol=0)
