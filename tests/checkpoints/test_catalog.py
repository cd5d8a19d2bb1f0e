import pytest

from kornia_tinyvit import TinyViTConfig
from kornia_tinyvit.checkpoints.catalog import CATALOG, default_weights, find_weights, imagenet_classes, list_pretrained

MIRROR = "https://huggingface.co/kornia/tiny_vit/resolve/main/"
ORIGINAL = "https://github.com/wkcn/TinyViT-model-zoo/releases/download/checkpoints/"
TIMM = "https://huggingface.co/timm/tiny_vit_{}/resolve/main/model.safetensors"

# variant, name, file, whether kornia has a mirror, timm's name, image size, classes, top-1 and top-5 of the paper
PUBLISHED = [
    ("5m", "in22k", "tiny_vit_5m_22k_distill", True, "5m_224.dist_in22k", 224, 21841, None, None),
    ("11m", "in22k", "tiny_vit_11m_22k_distill", True, "11m_224.dist_in22k", 224, 21841, None, None),
    ("21m", "in22k", "tiny_vit_21m_22k_distill", True, "21m_224.dist_in22k", 224, 21841, None, None),
    ("5m", "in1k", "tiny_vit_5m_22kto1k_distill", True, "5m_224.dist_in22k_ft_in1k", 224, 1000, 80.7, 95.6),
    ("11m", "in1k", "tiny_vit_11m_22kto1k_distill", True, "11m_224.dist_in22k_ft_in1k", 224, 1000, 83.2, 96.5),
    ("21m", "in1k", "tiny_vit_21m_22kto1k_distill", True, "21m_224.dist_in22k_ft_in1k", 224, 1000, 84.8, 97.3),
    ("5m", "in1k_scratch", "tiny_vit_5m_1k", False, "5m_224.in1k", 224, 1000, 79.1, 94.8),
    ("11m", "in1k_scratch", "tiny_vit_11m_1k", False, "11m_224.in1k", 224, 1000, 81.5, 95.8),
    ("21m", "in1k_scratch", "tiny_vit_21m_1k", False, "21m_224.in1k", 224, 1000, 83.1, 96.5),
    ("21m", "in1k_384", "tiny_vit_21m_22kto1k_384_distill", True, "21m_384.dist_in22k_ft_in1k", 384, 1000, 86.2, 97.8),
    ("21m", "in1k_512", "tiny_vit_21m_22kto1k_512_distill", True, "21m_512.dist_in22k_ft_in1k", 512, 1000, 86.5, 97.9),
]


class TestSmoke:
    def test_complete(self):
        ours = {(weights.variant, weights.name) for weights in CATALOG}
        assert ours == {row[:2] for row in PUBLISHED} | {("1m", "cifar10"), ("5m", "mobile_sam")}
        assert len(ours) == len(CATALOG)

    @pytest.mark.parametrize(
        ("variant", "names"),
        [
            ("1m", ["cifar10"]),
            ("5m", ["in1k", "in22k", "in1k_scratch", "mobile_sam"]),
            ("11m", ["in1k", "in22k", "in1k_scratch"]),
            ("21m", ["in1k", "in22k", "in1k_scratch", "in1k_384", "in1k_512"]),
            ("9m", []),
        ],
    )
    def test_list_pretrained(self, variant, names):
        found = list_pretrained(variant)
        assert [weights.name for weights in found] == names
        assert all(weights.variant == variant for weights in found)

    def test_list_all(self):
        assert list_pretrained() == list(CATALOG)


@pytest.mark.parametrize(
    ("variant", "name", "file", "mirrored", "timm", "size", "classes", "top1", "top5"),
    PUBLISHED,
    ids=[row[2] for row in PUBLISHED],
)
class TestPublished:
    def test_urls(self, variant, name, file, mirrored, timm, size, classes, top1, top5):
        weights = find_weights(variant, name)
        mirror = [f"{MIRROR}{file}.pth"] if mirrored else []
        assert list(weights.urls) == [*mirror, f"{ORIGINAL}{file}.pth"]
        assert weights.fallback == TIMM.format(timm)
        assert weights.asset_path is None
        assert weights.license == "MIT"

    def test_fields(self, variant, name, file, mirrored, timm, size, classes, top1, top5):
        weights = find_weights(variant, name)
        assert (weights.img_size, weights.num_classes) == (size, classes)
        assert (weights.top1, weights.top5) == (top1, top5)
        assert weights.class_names == (imagenet_classes() if classes == 1000 else None)

    def test_config(self, variant, name, file, mirrored, timm, size, classes, top1, top5):
        windows = {224: (7, 7, 14, 7), 384: (12, 12, 24, 12), 512: (16, 16, 32, 16)}[size]
        drop_path = 0.1 if size > 224 else {"5m": 0.0, "11m": 0.1, "21m": 0.2}[variant]
        expected = TinyViTConfig.from_variant(
            variant, img_size=size, num_classes=classes, window_sizes=windows, drop_path_rate=drop_path
        )
        assert find_weights(variant, name).config == expected


class TestOthers:
    def test_mobile_sam(self):
        weights = find_weights("5m", "mobile_sam")
        assert weights.urls[0] == "https://huggingface.co/kornia/mobile_sam/resolve/main/mobile_sam.pt"
        assert weights.urls[1].startswith("https://github.com/ChaoningZhang/MobileSAM/")
        assert weights.urls[1].endswith("/weights/mobile_sam.pt")
        assert weights.config == TinyViTConfig.from_variant("5m", img_size=1024, mobile_sam=True)
        assert weights.class_names is None
        assert weights.license == "Apache-2.0"

    def test_embedded(self):
        weights = find_weights("1m", "cifar10")
        assert (weights.urls, weights.fallback) == ((), None)
        assert weights.asset_path.name == "tiny_vit_1m_cifar10.safetensors"
        expected = TinyViTConfig.from_variant("1m", num_classes=10, img_size=96, window_sizes=(12, 12, 6, 3))
        assert weights.config == expected
        assert weights.class_names is None  # stored in the file


class TestChoice:
    @pytest.mark.parametrize(
        ("variant", "img_size", "name"),
        [
            ("1m", None, "cifar10"),
            ("1m", 512, "cifar10"),
            ("5m", None, "in1k"),
            ("5m", 512, "in1k"),
            ("11m", 384, "in1k"),
            ("21m", None, "in1k"),
            ("21m", 224, "in1k"),
            ("21m", 383, "in1k"),
            ("21m", 384, "in1k_384"),
            ("21m", 511, "in1k_384"),
            ("21m", 512, "in1k_512"),
            ("21m", 1024, "in1k_512"),
        ],
    )
    def test_default_weights(self, variant, img_size, name):
        weights = default_weights(variant, img_size)
        assert (weights.variant, weights.name) == (variant, name)

    def test_find_weights(self):
        assert find_weights("21m", "in1k").variant == "21m"
        assert find_weights(None, "in1k_384").variant == "21m"
        assert find_weights(None, "cifar10").variant == "1m"
        assert find_weights(None, "in1k") is None  # ambiguous
        assert find_weights("5m", "in1k_384") is None
        assert find_weights("5m", "in2k") is None


class TestImagenetClasses:
    def test_names(self):
        names = imagenet_classes()
        assert len(names) == len(set(names)) == 1000
        assert all(name == name.strip() and name for name in names)
        assert (names[0], names[999]) == ("tench", "toilet tissue")
