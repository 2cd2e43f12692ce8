"""Shards under the trainer: batches by tokens, static masks with pairs, dynamic ones by words."""

import corpora
import pytest

from bert_fast import BertConfig
from bert_fast.data.pretraining import ShardDataset
from bert_fast.data.shards import build
from bert_fast.modules import BertForMaskedLM, BertForPreTraining
from bert_fast.training import MaskingCollator, Trainer, TrainingArguments


class Counting(ShardDataset):
    """Counts what is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("objective", "masking", "scheme"), [("sop", "static", "subword"), ("none", "dynamic", "span")]
)
def test_training_on_shards(tmp_path, objective, masking, scheme):
    chosen = corpora.options(objective=objective, masking=masking, scheme=scheme)
    build([corpora.write(tmp_path)], "demo", tmp_path / "data", chosen, num_workers=1)
    dataset = Counting(tmp_path / "data")
    config = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model, collator = (BertForMaskedLM if objective == "none" else BertForPreTraining)(config), None
    if masking == "dynamic":
        ids = dataset.manifest["tokenizer"]["ids"]
        collator = MaskingCollator(
            vocab_size=30522,
            mask_token_id=ids["mask_token"],
            special_token_ids=[ids["cls_token"], ids["sep_token"], ids["pad_token"]],
            scheme=dataset.manifest["options"]["scheme"],
            max_predictions=dataset.manifest["options"]["max_predictions_per_seq"],
        )
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, max_tokens_per_batch=256, use_cpu=True, save_strategy="no",
        disable_tqdm=True, plot_metrics=False, logging_steps=1, report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=collator)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] <= 256
    read = dataset.reads
    assert read < len(dataset), "the lengths come without reading the instances"
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(9 < loss < 12 for loss in losses)  # log(30522) = 10.3, and log(2) for pairs
