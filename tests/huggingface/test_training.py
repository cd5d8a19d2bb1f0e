"""Losses, gradient checkpointing, transformers' Trainer and PEFT."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from kornia_tinyvit.huggingface import TinyVitForImageClassification, to_tinyvit
from kornia_tinyvit.layers import MBConv, TinyViTBlock
from kornia_tinyvit.training import freeze_statistics
from tests.huggingface.helpers import tiny_backbone, tiny_classifier


class Colors(Dataset):
    """Images whose class is their bright channel."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, object]:
        image = 0.1 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        image[index % 3] += 1.0
        return {"pixel_values": image, "labels": index % 3}


@pytest.fixture
def arguments(tmp_path) -> TrainingArguments:
    pytest.importorskip("accelerate")
    return TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=6,
        save_steps=6,
        logging_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


class TestProblemTypes:
    @pytest.mark.parametrize(
        ("problem", "classes", "labels", "loss"),
        [
            ("single_label_classification", 7, torch.tensor([3, 5]), F.cross_entropy),
            ("multi_label_classification", 7, torch.eye(7)[:2], F.binary_cross_entropy_with_logits),
            ("regression", 1, torch.tensor([0.5, -1.0]), lambda found, expected: F.mse_loss(found.squeeze(), expected)),
        ],
    )
    def test_loss(self, problem, classes, labels, loss, images):
        model = tiny_classifier(num_classes=classes)
        model.config.problem_type = problem
        outputs = model(images, labels=labels)
        torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
        outputs.loss.backward()
        assert model.classifier.weight.grad.any()

    def test_derived_from_labels(self, images):
        model = tiny_classifier()
        model(images, labels=torch.tensor([0, 1]))
        assert model.config.problem_type == "single_label_classification"

    def test_tuple(self, images):
        loss, logits = tiny_classifier()(images, labels=torch.tensor([0, 1]), return_dict=False)
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 1])))


class TestCheckpointing:
    @staticmethod
    def gradients(model, images, calls: list[int]) -> list[torch.Tensor]:
        counted = [module for module in model.modules() if isinstance(module, (MBConv, TinyViTBlock))]
        handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in counted]
        model.zero_grad()
        # In training mode the second forward pass would update the batch statistics again.
        outputs = model.eval()(images, return_dict=False)[0]
        outputs = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        outputs.square().mean().backward()
        for handle in handles:
            handle.remove()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    @pytest.mark.parametrize("make", [tiny_classifier, tiny_backbone], ids=["classifier", "backbone"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_same_gradients(self, make, reentrant, images):
        model = make()
        plain, recomputed = [], []
        reference = self.gradients(model, images, plain)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_activation_checkpointing
        for found, expected in zip(self.gradients(model, images, recomputed), reference, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert len(recomputed) == 2 * len(plain) == 10
        model.activation_checkpointing_disable()
        assert not model.is_activation_checkpointing

    def test_with_attentions(self, images):
        """The second forward pass of a block does not record its attention weights again."""
        model = tiny_classifier()
        model.set_attn_implementation("eager")
        model.activation_checkpointing_enable()
        outputs = model(images, output_attentions=True, output_hidden_states=True)
        outputs.logits.sum().backward()
        assert len(outputs.attentions) == 4
        assert len(outputs.hidden_states) == 5


class TestTrainer:
    def test_training(self, arguments):
        model = tiny_classifier(num_classes=3)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Colors(),
            eval_dataset=Colors(),
            compute_metrics=lambda result: {
                "accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())
            },
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_loss"] < 0.5 * before["eval_loss"]
        assert after["eval_accuracy"] > 0.9

    def test_resume(self, arguments, tmp_path):
        model = tiny_classifier(num_classes=3)
        Trainer(model, arguments, train_dataset=Colors(), eval_dataset=Colors()).train()
        kept = TinyVitForImageClassification.from_pretrained(tmp_path / "checkpoint-12")
        # Not from_pretrained, which maps weights from the file: some kernels round differently for their alignment.
        half = tiny_classifier(num_classes=3)
        resumed = Trainer(half, arguments, train_dataset=Colors(), eval_dataset=Colors())
        assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6")).global_step == 12
        for found, expected in zip(half.state_dict().values(), kept.state_dict().values(), strict=True):
            torch.testing.assert_close(found, expected)


class TestPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def adapted(self, peft, **changes):
        settings = {"target_modules": ["qkv", "proj"], "modules_to_save": ["classifier"], "r": 4, **changes}
        return peft.get_peft_model(tiny_classifier(), peft.LoraConfig(**settings))

    def test_trainable_parameters(self, peft, images):
        model = self.adapted(peft)
        expected = tiny_classifier()(images).logits
        torch.testing.assert_close(model.eval()(images).logits, expected)  # an adapter is initialized to zero
        model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
        learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert all("lora_" in name or "classifier" in name for name in learning)
        attentions = {name.split(".lora_")[0] for name in learning if "lora_" in name}
        assert len(attentions) == 8  # two linear layers of four attentions

    def test_files_and_merging(self, peft, images, tmp_path):
        model = self.adapted(peft)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.5)
        for _ in range(3):
            model.eval()(images, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
        tuned = model(images).logits
        assert not torch.allclose(tuned, tiny_classifier()(images).logits, atol=1e-3)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path).eval()
        torch.testing.assert_close(again(images).logits, tuned)
        merged = again.merge_and_unload()
        assert isinstance(merged, TinyVitForImageClassification)
        torch.testing.assert_close(merged(images).logits, tuned, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("extra", [[], ["norm_head"]])
    def test_trained_in_training_mode(self, peft, images, tmp_path, extra):
        """Statistics of batch norm would move in training, and adapters do not store them."""
        model = self.adapted(peft, modules_to_save=["classifier", *extra])
        handle = freeze_statistics(model)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.5)
        for _ in range(2):
            model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
        tuned = model.eval()(images).logits
        assert not torch.allclose(tuned, tiny_classifier()(images).logits, atol=1e-2)
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(images).logits, tuned, atol=1e-5, rtol=0)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = TinyVitForImageClassification.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(images).logits, tuned, atol=1e-4, rtol=1e-4)
        assert to_tinyvit(merged).class_names is None
        torch.testing.assert_close(to_tinyvit(merged)(images), tuned, atol=1e-4, rtol=1e-4)
        handle.remove()
        model.train()(images)
        model.save_pretrained(tmp_path / "moved")
        moved = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "moved").eval()
        assert not torch.allclose(moved(images).logits, model.eval()(images).logits, atol=1e-3)

    def test_convolutions(self, peft, images, tmp_path):
        """PEFT replaces the convolutions, which are then not folded with their norms."""
        model = self.adapted(peft, target_modules=r".*(conv1|conv3|seq\.\d)\.c", init_lora_weights=False)
        assert sum("lora_A" in name for name, _ in model.named_parameters()) > 4
        base = tiny_classifier()(images).logits
        assert not torch.allclose(model.eval()(images).logits, base, atol=1e-2)
        freeze_statistics(model)
        model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
        assert all(each.grad is not None for name, each in model.named_parameters() if "lora_" in name)
        torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.01).step()
        tuned = model.eval()(images).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path).eval()
        torch.testing.assert_close(again(images).logits, tuned, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.merge_and_unload()(images).logits, tuned, atol=1e-4, rtol=1e-4)

    def test_saved_norms(self, peft, images, tmp_path):
        """Norms in modules_to_save are trained and stored with their statistics."""
        model = self.adapted(peft, modules_to_save=["classifier", "bn"])
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
        for _ in range(2):
            model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path).eval()
        torch.testing.assert_close(again(images).logits, model.eval()(images).logits, atol=1e-5, rtol=0)

    def test_trainer(self, peft, arguments, images, tmp_path):
        """Trainer calls model.train() before every step."""
        model = self.adapted(peft)
        freeze_statistics(model)
        Trainer(model, arguments, train_dataset=Colors(), eval_dataset=Colors()).train()
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(images).logits, model.eval()(images).logits, atol=1e-5, rtol=0)

    def test_adapter_of_the_model_itself(self, peft, images):
        model = tiny_classifier()
        model.add_adapter(peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))
        changed = model(images).logits
        model.disable_adapters()
        assert not torch.allclose(model(images).logits, changed, atol=1e-3)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_with_checkpointing(self, peft, reentrant, images):
        model = self.adapted(peft)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
        assert all(each.grad is not None for name, each in model.named_parameters() if "lora_" in name)
