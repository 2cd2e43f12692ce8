"""The part of the trainer that makes batches: by tokens, or transformers' own; their order, and the place in it."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length

from bert_fast.heads import Head
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.batches import PackingCollator, TokenBudgetSampler
from bert_fast.training.durable import DurableTrainer
from bert_fast.training.inspection import InspectingCollator, Inspector, dataset_digest
from bert_fast.training.masking import IndexedDataset
from bert_fast.training.phases import PhasedSampler


class BatchedTrainer(DurableTrainer):
    """A `DurableTrainer` with `max_tokens_per_batch`, and with the facts about each batch in it.

    Attributes:
        inspector: finds the facts.
        followers: what has a `set_epoch`, called before each epoch.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **options: Any) -> None:
        if args.max_tokens_per_batch is not None and options.get("data_collator") is None:
            most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
            options["data_collator"] = PackingCollator(max_position_embeddings=most)
        super().__init__(model, args, **options)
        self.inspector = Inspector(model)
        spans = self.inspector.head == "BertForQuestionAnswering" and not isinstance(model, Head)
        if args.max_tokens_per_batch is not None and spans:
            raise ValueError(
                f"max_tokens_per_batch is {args.max_tokens_per_batch}, but the start_positions of transformers' "
                f"{type(model).__name__} count from the beginning of a padded text: take bert_fast's, or leave it out"
            )
        self.followers: list[Any] = [self.data_collator] if hasattr(self.data_collator, "set_epoch") else []
        self._sampler: TokenBudgetSampler | PhasedSampler | None = None
        self._digest: str | None = None
        self._cuts_batches = False
        # Shared, because workers that persist keep the copy that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by tokens, or transformers' own, with the facts about each."""
        examples: Any = self.train_dataset
        if examples is None or isinstance(examples, IterableDataset):
            if self.args.max_tokens_per_batch is not None:
                raise ValueError("max_tokens_per_batch needs a train_dataset with a length")
            return super().get_train_dataloader()
        if not len(examples):
            raise ValueError("train_dataset is empty")
        dataset = IndexedDataset(examples)
        if self.args.max_tokens_per_batch is None:
            return self._get_dataloader(
                dataset, "Training", self._train_batch_size, lambda _: self._get_train_sampler(), is_training=True
            )
        loader = DataLoader(
            dataset,
            batch_sampler=self._token_sampler(examples, self.args.max_tokens_per_batch),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "Training"),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            generator=torch.Generator().manual_seed(self.args.seed),  # else each epoch would take from torch's own
        )
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )

    def _token_sampler(self, examples: Any, max_tokens: int) -> TokenBudgetSampler | PhasedSampler:
        if self._sampler is None:
            self._sampler = TokenBudgetSampler(
                _lengths(examples),
                max_tokens,
                seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
                num_replicas=self.args.world_size,
                rank=self.args.process_index,
                drop_last=self.args.dataloader_drop_last,
            )
        return self._sampler

    def _set_signature_columns_if_needed(self) -> None:
        """The names that a model takes; of ours those of the class, which a subclass need not repeat."""
        super()._set_signature_columns_if_needed()
        if isinstance(self.model, Head):
            names = inspect.signature(Head.forward).parameters
            self._signature_columns = [*names, *self.model.other_labels]  # type: ignore[assignment]

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if self._cuts_batches:
            return super()._get_collator_with_removed_columns(data_collator, description)
        self._set_signature_columns_if_needed()
        columns = self._signature_columns if self.args.remove_unused_columns else None
        if description != "Training" and hasattr(data_collator, "set_epoch"):
            data_collator = copy.deepcopy(data_collator)  # whose epoch stays, and its masks with it
            data_collator.set_epoch(0)
        seeds = (self.args.seed, self._epoch) if description == "Training" else None
        return InspectingCollator(data_collator, columns, self.inspector, seeds)

    def _get_dataloader(self, dataset: Any, description: str, *others: Any, **options: Any) -> Any:
        if description != "Training" and has_length(dataset) and not isinstance(dataset, IterableDataset):
            dataset = IndexedDataset(dataset)
        # accelerate cuts the batches of a stream into parts for the processes, which only tensors can be.
        self._cuts_batches = isinstance(dataset, IterableDataset) and self.args.world_size > 1
        return super()._get_dataloader(dataset, description, *others, **options)

    # The order of the data, and the place in it

    def order(self) -> dict[str, Any]:
        """See `DurableTrainer`."""
        args = self.args
        if self._digest is None and has_length(self.train_dataset):
            self._digest = dataset_digest(self.train_dataset)
        order = {"data": self._digest, "seed": args.seed, "data_seed": args.data_seed}
        order |= getattr(self.data_collator, "order", {})
        names = ["max_tokens_per_batch", "dataloader_drop_last"]
        if args.max_tokens_per_batch is None:
            names += ["world_size", "per_device_train_batch_size", "gradient_accumulation_steps"]
            names += ["train_sampling_strategy"]
        return order | {name: getattr(args, name) for name in names}

    def position(self) -> dict[str, Any]:
        """See `DurableTrainer`."""
        if self._sampler is None:
            return super().position()
        state = {**self._sampler.state_dict(), "start_batch": self.batches_done}
        if self.batches_done == self._sampler.num_batches():
            state |= {"epoch": self._sampler.epoch + 1, "start_batch": 0, "earlier": []}
        return state

    def go_to(self, position: dict[str, Any], place: tuple[int, int]) -> tuple[int, int]:
        """See `DurableTrainer`; with another number of processes these share what is left of the epoch."""
        if self._sampler is None:
            return place
        same = position["num_replicas"] == self.args.world_size
        self._sampler.load_state_dict({**position, "start_batch": 0} if same else position)
        return position["epoch"], position["start_batch"] if same else 0

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """transformers' numbers of epochs and steps; by tokens the epochs have different numbers of batches."""
        if self._sampler is not None:
            self._sampler.set_epoch(0)
        epochs, per_epoch, *others, in_epoch, max_steps = super().set_initial_training_values(args, dataloader)
        if self._sampler is not None and args.max_steps > 0:
            epochs = sys.maxsize
        elif self._sampler is not None:
            steps = [self._steps(self._sampler.num_batches(epoch)) for epoch in range(epochs)]
            part = args.num_train_epochs - (epochs - 1)
            max_steps = sum(steps[:-1]) + math.ceil(part * steps[-1])
        return epochs, per_epoch, *others, in_epoch, max_steps

    def _steps(self, num_batches: int) -> int:
        return math.ceil(num_batches / self.args.gradient_accumulation_steps)

    def _run_epoch(self, *, epoch: int, **options: Any) -> None:  # type: ignore[override]
        if self.state.global_step >= self.state.max_steps:  # resumed at its end
            self.control.should_training_stop = True
            return
        self._epoch.fill_(epoch)
        for follower in [*self.followers, *([self._sampler] if self._sampler else [])]:
            follower.set_epoch(epoch)
        resumed = options["resume_from_checkpoint"] is not None and epoch == options["epochs_trained"]
        self.batches_done = options["steps_trained_in_current_epoch"] if resumed else 0
        if self._sampler is not None:
            options["steps_in_epoch"] = self._sampler.num_batches()
            options["num_update_steps_per_epoch"] = self._steps(options["steps_in_epoch"])
        super()._run_epoch(epoch=epoch, **options)


def _lengths(examples: Any) -> Any:
    """Tokens of each example: what the data set says itself, as that of pre-training does, or of all of them."""
    if hasattr(examples, "lengths"):
        return examples.lengths
    return [len(examples[index]["input_ids"]) for index in range(len(examples))]
