"""The part of the trainer that loses no run: one run in a folder, whole checkpoints, exact resume, SIGTERM."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_gather

from bert_fast import disk, saving
from bert_fast.heads import Head
from bert_fast.loading import listed, names_of_each
from bert_fast.training import checkpoints
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.memory import kept_memory
from bert_fast.training.signals import Termination

logger = logging.getLogger(__name__)

#: transformers' state of a run, and ours, in a checkpoint.
RUN_FILE = "run.json"


class DurableTrainer(transformers.Trainer):
    """transformers' `Trainer`, whose runs survive.

    Attributes:
        terminating: whether SIGTERM has reached any process: the run saves after this step and ends with status 0.
        skipped_steps: optimiser steps left out because something was not finite, since the beginning of the run.
        batches_done: micro-batches trained on in this epoch.
    """

    args: TrainingArguments

    def __init__(self, *args: Any, **options: Any) -> None:
        self.terminating = False
        self.skipped_steps = 0
        self.batches_done = 0
        self._signals = Termination()
        self._logged: dict[str, float] | None = None
        super().__init__(*args, **options)
        self.add_callback(_Ending(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: True for the last whole checkpoint of the output folder, or the beginning if there
                is none; the folder of one; False for the beginning. Not given, it is that of the arguments.
            trial, ignore_keys_for_eval: as in transformers.

        Returns:
            transformers' `TrainOutput`.

        Raises:
            ValueError: the output folder has checkpoints, and none was asked for; the data or what orders them changed.
            CheckpointError: what was asked for is not whole; a checkpoint cannot be written.
            RuntimeError: another run has the output folder.
            SystemExit: with status 0, after SIGTERM and a checkpoint.
        """
        wanted = resume_from_checkpoint
        if wanted is None:  # a command line gives words
            named = self.args.resume_from_checkpoint
            wanted = {"true": True, "false": False}.get(str(named).lower(), named)
        _warn_of_a_shared_store()
        with ExitStack() as stack:
            checkpoint = self._claim(stack, wanted)
            self._signals.requested = self.terminating = False
            stack.enter_context(self._signals)
            stack.enter_context(kept_memory())
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _claim(self, stack: ExitStack, wanted: str | bool | None) -> str | None:
        """Take the output folder, and find the checkpoint to go on from; the first process does, for all."""
        answer: list[Any] = [None, None]
        if self.is_world_process_zero():
            output_dir = Path(self._get_output_dir(trial=None))
            try:
                stack.enter_context(disk.locked(output_dir))
                checkpoints.remove_leftovers(output_dir)
                answer[0] = _checkpoint(output_dir, wanted)
            except Exception as error:  # whatever it is, the other processes must not wait for an answer
                answer[1] = error
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def order(self) -> dict[str, Any]:
        """What decides which batches come in which order; it may not change while a run is interrupted."""
        raise NotImplementedError

    def position(self) -> dict[str, Any]:
        """Where in the data the run is."""
        return {"batches": self.batches_done}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        self.store_flos()
        with checkpoints.staged(
            folder, leader=self.args.should_save, barrier=self.accelerator.wait_for_everyone
        ) as staging:
            self._write(staging, folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoints.prune(output_dir, self.args.save_total_limit, [folder, *([Path(best)] if best else [])])

    def _write(self, staging: Path, folder: Path) -> None:
        """Everything that is needed to go on, by transformers' names."""
        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        logged = {
            "loss": nested_gather(self._tr_loss, self.args.parallel_mode).mean().item(),
            "step": self._globalstep_last_logged,
        }
        if not self.args.should_save:
            return
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        stateful = [
            part for part in [*self.callback_handler.callbacks, self.control] if isinstance(part, ExportableState)
        ]
        states = TrainerState(stateful_callbacks=stateful)  # type: ignore[arg-type]
        self.state.stateful_callbacks = states.stateful_callbacks
        self.state.save_to_json(str(staging / checkpoints.STATE_FILE))
        run = {
            "order": self.order(),
            "position": self.position(),
            "skipped_steps": self.skipped_steps,
            "logged": logged,
            "only_model": self.args.save_only_model,
        }
        (staging / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Ours are written as `save_pretrained` writes them: with their config, and tied weights once."""
        if not isinstance(self.model, Head):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self._get_output_dir(trial=None))
            folder.mkdir(parents=True, exist_ok=True)
            saving.write_files(self.model, folder, state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(folder))
            torch.save(self.args, folder / "training_args.bin")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not isinstance(self.model, Head):
            super()._issue_warnings_after_load(load_result)
            return
        groups = names_of_each(dict(self.model.named_parameters(remove_duplicate=False)))
        tied = {name for names in groups for name in names[1:]}
        missing = set(load_result.missing_keys) - tied
        if missing or load_result.unexpected_keys:
            absent, unexpected = (listed(sorted(names), 3) for names in (missing, load_result.unexpected_keys))
            raise ValueError(
                f"the checkpoint does not fit the {type(self.model).__name__}: it lacks {absent} and has {unexpected} "
                "besides"
            )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        if resume_from_checkpoint is not None:
            self._count_steps(max_steps)
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.skipped_steps, self.batches_done, self._logged = 0, 0, None
        order = self.order()  # now, and not only when something is saved: the data may change while the run goes on
        if resume_from_checkpoint is None:
            return place
        file = Path(resume_from_checkpoint) / RUN_FILE
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["only_model"]:
            raise ValueError(f"{resume_from_checkpoint} was saved with save_only_model: a run cannot go on from it")
        self.skipped_steps, self._logged = run["skipped_steps"], run["logged"]
        if self.args.ignore_data_skip:
            return place
        _check_order(run["order"], order)
        return self.go_to(run["position"], place)

    def _count_steps(self, max_steps: int) -> None:
        """Steps that are given as a share of all, as a number: transformers compares them with the checkpoint's."""
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(self.args, name)
            if steps is not None and 0 < steps < 1:
                setattr(self.args, name, math.ceil(max_steps * steps))

    def go_to(self, position: dict[str, Any], place: tuple[int, int]) -> tuple[int, int]:
        """The epoch to go on in, and how many of its batches to leave out; `place` is what transformers says."""
        return place


class _Ending(TrainerCallback):
    """Goes on with the loss that was not logged yet, and ends a run that was asked to."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As transformers begins each call of `train` with a mean of its own."""
        if self.trainer._logged is not None:
            self.trainer._tr_loss += self.trainer._logged["loss"]
            self.trainer._globalstep_last_logged = int(self.trainer._logged["step"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save."""
        if self.trainer.terminating:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """And leave."""
        if self.trainer.terminating:
            logger.warning("SIGTERM: saved checkpoint-%d, ending", state.global_step)
            self.trainer.callback_handler.on_train_end(args, state, control)
            raise SystemExit(0)


def _checkpoint(output_dir: Path, wanted: str | bool | None) -> str | None:
    if wanted is True:
        found = checkpoints.last_whole(output_dir)
        if found is None:
            logger.warning("%s has no checkpoint: the run starts from the beginning", output_dir)
        return None if found is None else str(found)
    if wanted:
        return str(checkpoints.chosen(Path(wanted), output_dir))
    if present := checkpoints.listed(output_dir):
        raise ValueError(
            f"{output_dir} has checkpoints up to {present[-1].name}: go on with resume_from_checkpoint=True "
            "(--resume_from_checkpoint true), or choose another output_dir"
        )
    return None


def _warn_of_a_shared_store() -> None:
    """Of torchrun's store, which keeps the addresses of processes that a restart has replaced: gloo waits for them.

    As of torch 2.13, in `DynamicRendezvousHandler.next_rendezvous`; pytorch issue 135712 is about the same for NCCL.
    """
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0"
    if shares and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        logger.warning(
            "torchrun keeps one store over all restarts, so that processes may wait for ever for the ones before them: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )


def _check_order(before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]:
        differences = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in sorted(changed))
        raise ValueError(
            f"the run cannot go on where it was, for its batches would be other ones: {differences}. With "
            "ignore_data_skip=True it goes on from the beginning of an epoch"
        )
