import copy
import threading
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from kornia.geometry.transform import hflip
from PIL import Image
from torch import nn
from torch.autograd import gradcheck

from kornia_tinyvit import ImageClassifier, Prediction, TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints import open_pretrained
from kornia_tinyvit.checkpoints.catalog import ASSETS, imagenet_classes
from kornia_tinyvit.classification import center_zoom
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.images import read_image
from kornia_tinyvit.preprocessing import EvaluationPipeline
from tests.conftest import TINY, liven, shared

PHOTOS = sorted(path for path in (ASSETS / "photos").iterdir() if path.suffix in (".jpg", ".png"))
NAMES = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu")


@pytest.fixture
def classifier(tiny) -> ImageClassifier:
    return ImageClassifier(tiny, class_names=NAMES).eval()


@pytest.fixture
def photos() -> list[torch.Tensor]:
    """Images of different sizes."""
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, height, width, generator=generator) for height, width in ((64, 64), (80, 100), (33, 120))]


class TestForward:
    def test_batch(self, classifier, images):
        logits = classifier(images)
        assert logits.shape == (2, 7)
        torch.testing.assert_close(logits, classifier.model(EvaluationPipeline(64, 15 / 16)(images)))

    def test_list_of_sizes(self, classifier, photos):
        together = classifier(photos)
        alone = torch.cat([classifier(photo.unsqueeze(0)) for photo in photos])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier(tuple(photos)), together)

    def test_no_images(self, classifier):
        assert classifier(torch.rand(0, 3, 50, 70)).shape == (0, 7)
        with pytest.raises(ValueError, match=r"empty list of images; an empty batch is a tensor \(0, C, H, W\)"):
            classifier([])

    @pytest.mark.parametrize(("size", "fraction"), [(64, 15 / 16), (223, 15 / 16), (224, 0.875), (384, None)])
    def test_preprocessing_follows_the_resolution(self, size, fraction):
        preprocessing = ImageClassifier(TinyViT(**TINY | {"img_size": size})).preprocessing
        assert (preprocessing.img_size, preprocessing.crop_fraction) == (size, fraction)

    def test_own_preprocessing(self, tiny, images):
        torch.testing.assert_close(ImageClassifier(tiny, preprocessing=nn.Identity())(images), tiny(images))

    @pytest.mark.parametrize("channels", [1, 4, 6])
    def test_channels(self, channels):
        torch.manual_seed(0)
        classifier = ImageClassifier(liven(TinyViT(**TINY, in_chans=channels)))
        assert classifier(torch.rand(2, channels, 50, 70)).shape == (2, 7)
        mean = classifier.preprocessing.mean
        assert mean.tolist() == pytest.approx(
            [0.449] if channels == 1 else [0.485, 0.456, 0.406, 0.485, 0.456, 0.406][:channels], abs=1e-3
        )
        assert len(classifier.predict(torch.rand(channels, 40, 40))[0]) == 5
        if channels in (1, 4):
            assert len(classifier.predict(PHOTOS)) == len(PHOTOS)
        else:
            with pytest.raises(ValueError, match="1, 3 or 4 channels, not 6; pass tensors instead"):
                classifier.predict(PHOTOS)

    def test_gray_images_come_from_color_files(self):
        torch.manual_seed(0)
        classifier = ImageClassifier(liven(TinyViT(**TINY, in_chans=1)))
        assert classifier.predict(PHOTOS[0]) == classifier.predict(read_image(PHOTOS[0], 1))

    @pytest.mark.parametrize("change", [copy.deepcopy, lambda m: m.double().float(), lambda m: m.train().eval()])
    def test_copies(self, classifier, images, change):
        expected = classifier(images)
        torch.testing.assert_close(change(classifier)(images), expected)

    def test_state_dict_holds_the_network_alone(self, classifier):
        assert {name.split(".")[0] for name in classifier.state_dict()} == {"model"}


class TestViews:
    def test_logits_are_averaged(self, tiny, images):
        classifier = ImageClassifier(tiny, views=(hflip, center_zoom))
        plain = ImageClassifier(tiny)
        middle = images[..., 4:60, 4:60]
        expected = (plain(images) + plain(images.flip(3)) + plain(middle)) / 3
        torch.testing.assert_close(classifier(images), expected)
        assert not torch.allclose(plain(images), expected, atol=1e-3)
        torch.testing.assert_close(ImageClassifier(tiny, views=ImageClassifier.DEFAULT_VIEWS)(images), expected)

    def test_list_of_sizes(self, tiny, photos):
        classifier = ImageClassifier(tiny, views=ImageClassifier.DEFAULT_VIEWS)
        alone = torch.cat([classifier(photo.unsqueeze(0)) for photo in photos])
        torch.testing.assert_close(classifier(photos), alone, rtol=1e-4, atol=1e-5)

    def test_predictions_do_not_depend_on_a_flip(self, tiny, photos):
        classifier = ImageClassifier(tiny, views=(hflip,))
        for photo in photos:
            plain, flipped = (
                torch.tensor([each.score for each in classifier.predict(x)[0]]) for x in (photo, photo.flip(2))
            )
            torch.testing.assert_close(plain, flipped, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize(("size", "share", "left"), [((64, 80), 0.875, (56, 70)), ((5, 1), 0.5, (3, 1))])
    def test_center_zoom(self, size, share, left):
        x = torch.rand(2, 3, *size)
        zoomed = center_zoom(x, share)
        assert zoomed.shape[-2:] == left
        torch.testing.assert_close(zoomed.flip(2, 3), center_zoom(x.flip(2, 3), share))


class TestPredict:
    def test_sorted_softmax(self, classifier, photos):
        scores = classifier(photos).softmax(1)
        found = classifier.predict(photos, top_k=7)
        for row, predictions in zip(scores, found, strict=True):
            assert [each.index for each in predictions] == row.argsort(descending=True).tolist()
            assert [each.label for each in predictions] == [NAMES[each.index] for each in predictions]
            expected = row.sort(descending=True).values.tolist()
            assert [each.score for each in predictions] == pytest.approx(expected, rel=1e-4)
            assert sum(each.score for each in predictions) == pytest.approx(1)

    @pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (7, 7), (100, 7)])
    def test_top_k(self, classifier, images, top_k, count):
        assert [len(found) for found in classifier.predict(images, top_k)] == [count, count]

    def test_kinds_of_images(self, classifier):
        path = PHOTOS[0]
        tensor = read_image(path)
        expected = classifier.predict([tensor])
        assert isinstance(expected[0][0], Prediction)
        levels = np.asarray(Image.open(path).convert("RGB"))
        kinds = [path, str(path), Image.open(path), tensor, tensor.unsqueeze(0), [path], (Image.open(path),)]
        kinds += [path.read_bytes(), levels, levels[None], levels.astype(np.float32) / np.float32(255)]
        kinds += [torch.from_numpy(levels.copy()), torch.from_numpy(levels.transpose(2, 0, 1).copy())]
        for kind in kinds:
            assert classifier.predict(kind) == expected
        several = classifier.predict([path, tensor, Image.open(path)])
        for found in several:
            assert [each.label for each in found] == [each.label for each in expected[0]]
            assert [each.score for each in found] == pytest.approx([each.score for each in expected[0]], rel=1e-4)

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_batches(self, classifier, batch_size):
        seen = []
        hook = classifier.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        photos = [torch.rand(3, 60 + 5 * size, 70) for size in range(5)]
        found = classifier.predict(iter(photos), top_k=1, batch_size=batch_size)
        hook.remove()
        assert seen == [len(photos[start : start + batch_size]) for start in range(0, 5, batch_size)]
        assert [each[0].index for each in found] == [classifier.predict(p, 1)[0][0].index for p in photos]

    def test_reads_no_more_than_a_batch_ahead(self, classifier):
        read = []

        def photos():
            for index in range(12):
                read.append(index)
                yield torch.rand(3, 64, 64)

        ahead = []
        hook = classifier.model.register_forward_hook(lambda *_: ahead.append(len(read)))
        classifier.predict(photos(), batch_size=2)
        hook.remove()
        assert all(count <= 2 * (done + 2) + 1 for done, count in enumerate(ahead))

    def test_an_error_while_reading(self, classifier):
        def photos():
            yield torch.rand(3, 64, 64)
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            classifier.predict(photos(), batch_size=1)

    def test_none(self, classifier):
        assert classifier.predict([]) == []
        assert classifier.predict(torch.rand(0, 3, 40, 40)) == []

    def test_follows_the_networks_dtype(self, classifier, images):
        expected = classifier.predict(images)
        for found, exact in zip(classifier.double().predict(images), expected, strict=True):
            assert [each.score for each in found] == pytest.approx([each.score for each in exact], rel=1e-3)

    def test_changes_nothing(self, classifier, images):
        expected = classifier.predict(images)
        classifier.train()
        classifier.model.layers[1].eval()
        flags = [module.training for module in classifier.modules()]
        state = copy.deepcopy(classifier.state_dict())
        assert classifier.predict(images) == expected
        assert [module.training for module in classifier.modules()] == flags
        assert len(set(flags)) == 2
        for name, tensor in classifier.state_dict().items():
            assert torch.equal(tensor, state[name])
        with pytest.raises(ValueError, match="shape"):
            classifier.predict(torch.rand(2, 40, 40))
        assert [module.training for module in classifier.modules()] == flags

    def test_threads(self, classifier, photos):
        expected = classifier.predict(photos)
        results = []

        def work():
            results.extend(classifier.predict(photos) for _ in range(3))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected] * 6


class TestGradients:
    def test_gradcheck(self):
        torch.manual_seed(0)
        small = TINY | {"embed_dims": (4, 4, 4, 4), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 2}
        classifier = ImageClassifier(liven(TinyViT(**small | {"img_size": 32}))).double()
        x = 0.4 + 0.2 * torch.rand(1, 3, 37, 40, dtype=torch.float64)
        assert gradcheck(classifier, (x.requires_grad_(),), fast_mode=True)

    def test_behind_kornias_augmentations(self, classifier, images):
        torch.manual_seed(0)
        chain = nn.Sequential(K.RandomHorizontalFlip(p=1.0), K.ColorJiggle(0.1, 0.1, 0.1, 0.1, p=1.0), classifier)
        x = (0.2 + 0.6 * images).requires_grad_()
        logits = chain(x)
        assert logits.shape == (2, 7)
        logits.logsumexp(1).sum().backward()
        assert x.grad.isfinite().all()
        assert (x.grad != 0).float().mean() > 0.99
        flipped = nn.Sequential(K.RandomHorizontalFlip(p=1.0), classifier)
        torch.testing.assert_close(flipped(images), classifier(images.flip(3)))

    def test_trains(self, classifier, images):
        classifier.train()
        nn.functional.cross_entropy(classifier(images), torch.tensor([1, 2])).backward()
        assert all(parameter.grad is not None for parameter in classifier.parameters())

    def test_predict_does_not_poison_training(self, classifier, images):
        classifier.predict(images)
        classifier(images).sum().backward()


class TestExceptions:
    @pytest.mark.parametrize("images", [torch.zeros(2, 3, 40, 40).byte(), torch.zeros(3, 40, 40).byte()])
    def test_integers(self, classifier, images):
        """predict takes uint8 images, forward does not."""
        for kind in (images, [images] if images.ndim == 3 else list(images)):
            assert classifier.predict(kind) == classifier.predict(images.float())
        with pytest.raises(TypeError, match=r"torch\.uint8\. Use x.float\(\) / 255"):
            classifier(images if images.ndim == 4 else [images])

    @pytest.mark.parametrize("shape", [(2, 40, 40), (40,), (2, 5, 40, 40), (3, 0, 40), (1, 1, 3, 40, 40)])
    def test_shapes(self, classifier, shape):
        with pytest.raises(ValueError, match=r"An image must .*; got"):
            classifier.predict(torch.rand(shape))

    @pytest.mark.parametrize("photo", [3, [[1.0]], {"image": 1}, None])
    def test_no_image(self, classifier, photo):
        with pytest.raises(TypeError, match=r"An image must be a path, an encoded file .*; got"):
            classifier.predict([photo])

    @pytest.mark.parametrize("top_k", [0, -1])
    def test_top_k(self, classifier, images, top_k):
        with pytest.raises(ValueError, match=f"top_k must be a positive integer; got {top_k}"):
            classifier.predict(images, top_k)

    @pytest.mark.parametrize("setting", [{"top_k": 2.0}, {"batch_size": 1.5}, {"batch_size": 2**70}, {"top_k": True}])
    def test_no_whole_numbers(self, classifier, images, setting):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} must be a positive integer"):
            classifier.predict(images, **setting)

    def test_files(self, classifier, tmp_path):
        (tmp_path / "notes.jpg").write_text("no image")
        with pytest.raises(ValueError, match=r"notes\.jpg"):
            classifier.predict([PHOTOS[0], tmp_path / "notes.jpg"])
        with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
            classifier.predict(str(tmp_path / "gone.jpg"))

    @pytest.mark.parametrize("changes", [{"num_classes": 0}, {"mobile_sam": True}])
    def test_networks_without_classes(self, changes):
        with pytest.raises(ValueError, match="needs a network with a head"):
            ImageClassifier(TinyViT(**TINY | changes))

    @pytest.mark.parametrize("names", [(), ("ant", "bee"), (*NAMES, "hen")])
    def test_class_names(self, tiny, names):
        with pytest.raises(ValueError, match=f"Got {len(names)} class names for 7 classes"):
            ImageClassifier(tiny, class_names=names)


class TestClassNames:
    def test_numbers(self, tiny):
        assert ImageClassifier(tiny).class_names == tuple(f"class {index}" for index in range(7))

    def test_from_a_file(self, tiny, images, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "pets.safetensors", NAMES)
        for classifier in (
            ImageClassifier.from_config(pretrained=path),
            ImageClassifier.from_config(pretrained=str(path)),
            ImageClassifier.from_config(pretrained=open_pretrained(path)),
            ImageClassifier.from_config(tiny.config, pretrained=path),
        ):
            assert classifier.class_names == NAMES
            assert not any(module.training for module in classifier.modules())
            assert torch.equal(classifier(images), ImageClassifier(tiny)(images))

    def test_given_names_come_first(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "pets.safetensors", NAMES)
        other = tuple(name.upper() for name in NAMES)
        assert ImageClassifier.from_config(pretrained=path, class_names=other).class_names == other

    def test_a_new_head_has_no_names(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "pets.safetensors", NAMES)
        classifier = ImageClassifier.from_config(pretrained=path, num_classes=3)
        assert classifier.class_names == ("class 0", "class 1", "class 2")
        assert classifier.training

    def test_imagenet(self, tiny, tmp_path):
        tiny.reset_classifier(1000)
        path = save_checkpoint(tiny, tmp_path / "thousand.safetensors")
        names = ImageClassifier.from_config(pretrained=path).class_names
        assert names == tuple(imagenet_classes())
        assert names[281].startswith("tabby")
        assert ImageClassifier.from_config(tiny.config).class_names[281] == "class 281"

    def test_without_names(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "plain.safetensors")
        assert ImageClassifier.from_config(pretrained=path).class_names[0] == "class 0"


class TestEmbeddedWeights:
    @pytest.fixture
    def embedded(self) -> ImageClassifier:
        return ImageClassifier.from_config("1m", pretrained="cifar10")

    def test_size(self):
        path = Path(ASSETS / "tiny_vit_1m_cifar10.safetensors")
        assert path.stat().st_size < 4_000_000

    def test_names(self, embedded):
        expected = "airplane automobile bird cat deer dog frog horse ship truck"
        assert " ".join(embedded.class_names) == expected
        assert not embedded.training

    def test_cat(self):
        classifier = ImageClassifier.from_config("1m", pretrained="cifar10", views=ImageClassifier.DEFAULT_VIEWS)
        (found,) = classifier.predict(ASSETS / "photos" / "chelsea.png", top_k=3)
        assert found[0].label == "cat"

    def test_accuracy(self, embedded):
        data = ClassificationDataset.open(shared("data/cifar10/test.parquet"))
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(20)).tolist()[:500]
        photos, labels = zip(*(data[row] for row in rows), strict=True)
        with torch.inference_mode():
            guesses = torch.cat([embedded(list(photos[start : start + 100])) for start in range(0, 500, 100)])
        assert (guesses.argmax(1) == torch.tensor(labels)).float().mean() >= 0.85
