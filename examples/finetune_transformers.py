"""Fine-tune a TinyViT with transformers' Trainer, and save it for transformers' pipeline.

    python examples/finetune_transformers.py DATA --out runs/transformers

DATA is a folder with `train.parquet` and `test.parquet` in the Hugging Face layout (column `image` a struct of `bytes`
and `path`, column `label`), such as CIFAR-10. The network in the package gets a new head; with `--lora` only the head
and LoRA matrices of the attention are trained, and merged at the end. kornia augments each batch, and the image
processor resizes and normalizes it. Note that the network in the package was trained on CIFAR-10's training images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import kornia.augmentation as K
import torch
from torch import Tensor
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainingArguments, pipeline
from transformers.utils import logging

from kornia_tinyvit import TinyViT
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.data import ClassificationDataset
from kornia_tinyvit.huggingface import TinyVitForImageClassification, TinyVitImageProcessor, from_tinyvit

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def build_model(network: TinyViT, num_classes: int, lora: bool) -> torch.nn.Module:
    """Return the network with a new head as a model for transformers."""
    network.reset_classifier(num_classes)
    names = CLASSES if num_classes == len(CLASSES) else [f"class {index}" for index in range(num_classes)]
    model = from_tinyvit(network, names)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["qkv", "proj"], modules_to_save=["classifier"], r=8, lora_alpha=16)
    return get_peft_model(model, config)


def make_collator(processor: TinyVitImageProcessor, augmentation: torch.nn.Module | None):
    """Return a collator that augments images, if an augmentation is given, and applies the image processor."""

    def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        images = torch.stack([image for image, _ in items])
        images = images if augmentation is None else augmentation(images)
        inputs = processor(images, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([label for _, label in items])}

    return collate


class AugmentingTrainer(Trainer):
    """A trainer without augmentation in evaluation."""

    plain_collator = None

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the data loader with the collator without augmentation."""
        collator, self.data_collator = self.data_collator, self.plain_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


def accuracy(result: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    parser.add_argument("--train", type=int, default=4000, help="number of training images")
    parser.add_argument("--test", type=int, default=1000, help="number of test images")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--lora", action="store_true", help="train only the head and LoRA matrices of the attention")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)

    train = ClassificationDataset.open(args.data / "train.parquet").sample(args.train)
    test = ClassificationDataset.open(args.data / "test.parquet").sample(args.test)
    network = TinyViT.from_config("1m", pretrained="cifar10")
    model = build_model(network, train.num_classes, args.lora)
    processor = TinyVitImageProcessor.from_preprocessing(network.preprocessing)
    augmentation = torch.nn.Sequential(
        K.RandomHorizontalFlip(), K.RandomCrop((32, 32), padding=4), K.ColorJitter(0.2, 0.2, 0.2)
    )
    arguments = TrainingArguments(
        str(args.out / "trainer"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=250,
        learning_rate=args.lr,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=0,
    )
    trainer = AugmentingTrainer(
        model,
        arguments,
        make_collator(processor, augmentation),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.plain_collator = make_collator(processor, None)
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    before = trainer.evaluate()["eval_accuracy"]
    start = time.perf_counter()
    steps = trainer.train().global_step
    seconds = time.perf_counter() - start
    after = trainer.evaluate()["eval_accuracy"]
    finished: TinyVitForImageClassification = model.merge_and_unload() if args.lora else model
    finished.save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    result = {"lora": args.lora, "trainable": trainable, "train": len(train), "test": len(test), "steps": steps}
    print(json.dumps(result | {"accuracy_before": round(before, 4), "accuracy": round(after, 4)}))
    print(f"{seconds:.0f} s of training")

    classify = pipeline("image-classification", model=str(args.out / "model"))
    for photo in ("chelsea.png", "horse.png"):
        best = classify(str(ASSETS / "photos" / photo), top_k=1)[0]
        print(f"{photo:12} {best['label']:10} {best['score']:.1%}")


if __name__ == "__main__":
    main()
