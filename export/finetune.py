"""Training: next-token prediction on chapters, by Hugging Face's Trainer."""

import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from export.corpus import Corpus, TrainingChapter
from export.recipe import Training
from llm4es.errors import ConfigError, LLM4ESError

__all__ = ["Step", "Trained", "mean_nats", "train", "uses_bf16"]

_IGNORED = -100  # a label that cross entropy leaves out
_LOG_EVERY = 10
_NEWEST_LOOKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A look at training: losses in nats per token of the chapters, the header left out."""

    step: int
    train_loss: float | None = None  # mean since the look before
    held_out_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training did."""

    steps: int
    epochs: float
    train_loss: float  # mean of the newest looks
    curve: tuple[Step, ...]
    seconds: float


def train(
    model: PreTrainedModel,
    header: NDArray[np.int64],
    corpus: Corpus,
    recipe: Training,
    *,
    checkpoints: Path,
    runs: Path,
    console: Console,
) -> Trained:
    """Train `model` in place on the header (H,) and each chapter; weights stay fp32, seeded.

    Enriched texts, where the corpus has them, are chapters like the others, without the header;
    those of other logs stand behind headers of their own.

    `checkpoints` is a folder of this run alone: what it holds is gone on with, after a kill.
    With `patience` the weights of the best held-out loss are kept. With `track` the losses go to
    TensorBoard's files in `runs`, or to W&B. Raises LLM4ESError where the loss is no longer finite,
    ConfigError where the tracker is not installed.
    """
    _refuse_absent(recipe.track)
    collate = _Collator(pad_id=_pad_id(model))
    judged = recipe.patience is not None and bool(corpus.held_out)
    trained_model = _adapted(model, recipe)
    with _quietly():
        trainer = Trainer(
            model=trained_model,
            args=_arguments(recipe, checkpoints, runs, judged=judged),
            train_dataset=_Chapters(
                [(header, corpus.train), *((o.header_ids, o.chapters) for o in corpus.beside)],
                bare=corpus.enriched,
            ),
            eval_dataset=_Chapters([(header, corpus.held_out)]) if judged else None,
            data_collator=collate,
            callbacks=[_Bar(console, collate)],
        )
        trainer.remove_callback(PrinterCallback)  # it talks on stdout, which is for results
        if judged and recipe.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(recipe.patience))
        started = time.monotonic()
        begun = _newest_whole(checkpoints)
        if begun is not None:
            console.print(f"going on from {Path(begun).name}")
        if begun is None or not _taken_up(trainer, begun):
            trainer.train(resume_from_checkpoint=begun)
        seconds = time.monotonic() - started
    _undress(model, trained_model, trainer, recipe)
    curve = tuple(_looks(trainer.state.log_history))
    losses = [look.train_loss for look in curve if look.train_loss is not None]
    train_loss = float(np.mean(losses[-_NEWEST_LOOKS:]))
    if not np.isfinite(train_loss):
        msg = "training diverged (the loss is not finite): lower the learning rate"
        raise LLM4ESError(msg)
    return Trained(
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        train_loss=train_loss,
        curve=curve,
        seconds=seconds,
    )


def _newest_whole(checkpoints: Path) -> str | None:
    """Name the newest checkpoint that was written to its end; those torn by a kill are deleted.

    The Trainer writes the state's file last (`Trainer._save_checkpoint`), and not in one step: one
    that cannot be read is of a kill in the middle of it.
    """
    while checkpoints.is_dir():
        newest: str | None = get_last_checkpoint(str(checkpoints))
        if newest is None:
            break
        try:
            TrainerState.load_from_json(str(Path(newest) / TRAINER_STATE_NAME))
        except (FileNotFoundError, ValueError):
            shutil.rmtree(newest)
        else:
            return newest
    return None


def _taken_up(trainer: Trainer, checkpoint: str) -> bool:
    """Take the weights of a training that had come to its end, where the checkpoint is of one.

    The Trainer would go on for a step more, for it looks at the end of a step alone.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        return False
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or checkpoint)  # noqa: SLF001 - what `train` calls
    trainer.state = state
    return True


def _refuse_absent(tracker: str | None) -> None:
    if tracker is not None and find_spec(tracker) is None:
        raise ConfigError(
            "training.track", f"{tracker} is not installed", "install the extra: tracking"
        )


def _arguments(
    recipe: Training, checkpoints: Path, runs: Path, *, judged: bool
) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.steps if recipe.steps is not None else -1,
        per_device_train_batch_size=recipe.batch_chapters,
        per_device_eval_batch_size=recipe.batch_chapters,
        gradient_accumulation_steps=recipe.accumulate,
        gradient_checkpointing=recipe.gradient_checkpointing,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=recipe.warmup_share,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.max_grad_norm,
        bf16=uses_bf16(recipe.precision),
        use_cpu=not gpu,
        group_by_length=True,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if judged else "no",
        eval_steps=recipe.save_steps,
        load_best_model_at_end=judged,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        report_to=recipe.track or "none",
        logging_dir=str(runs),
        logging_first_step=True,
        logging_steps=_LOG_EVERY,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


def uses_bf16(precision: str) -> bool:
    """Say whether matrices are multiplied in bf16: asked for, or "auto" and native here."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and bool({"avx512_bf16", "amx_bf16"} & set(flags.read_text().split()))


def _adapted(model: PreTrainedModel, recipe: Training) -> Any:  # noqa: ANN401 - peft's, or it
    if recipe.gradient_checkpointing:
        model.enable_input_require_grads()
    if recipe.lora is None:
        return model
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - heavy, and seldom needed

    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules="all-linear",
    )
    return get_peft_model(model, adapter)


def _undress(
    model: PreTrainedModel,
    trained_model: Any,  # noqa: ANN401 - peft's, or the model
    trainer: Trainer,
    recipe: Training,
) -> None:
    """Leave the bare model, in evaluation mode: what training wrapped around it is not exported."""
    # accelerate leaves its autocast around `forward`.
    trainer.accelerator.unwrap_model(trained_model, keep_fp32_wrapper=False)
    if recipe.lora is not None:
        trained_model.merge_and_unload()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    model.eval()
    model.cpu()  # where it is exported and compared; training may have been on a GPU


def _looks(history: Sequence[dict[str, float]]) -> Iterator[Step]:
    for entry in history:
        if "loss" in entry:
            yield Step(step=int(entry["step"]), train_loss=entry["loss"])
        elif "eval_loss" in entry:
            yield Step(step=int(entry["step"]), held_out_loss=entry["eval_loss"])


def mean_nats(
    model: PreTrainedModel, header: NDArray[np.int64], chapters: Sequence[TrainingChapter]
) -> float | None:
    """Mean loss in nats per token of the chapters; None without chapters."""
    if not chapters:
        return None
    collate = _Collator(pad_id=_pad_id(model))
    data = _Chapters([(header, chapters)])
    total = 0.0
    tokens = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for index in range(len(data)):
            batch = {name: each.to(model.device) for name, each in collate([data[index]]).items()}
            count = len(chapters[index].tokens.ids)
            total += float(model(**batch).loss) * count
            tokens += count
    model.train(was_training)
    return total / tokens


class _Chapters(Dataset[dict[str, NDArray[np.int64]]]):
    """Header and chapter as `input_ids`; `labels` leave the header out of the loss.

    `logs` are each a header (H,) and the chapters behind it, `bare` ids (T,) that stand alone,
    their first token not predicted.
    """

    def __init__(
        self,
        logs: Sequence[tuple[NDArray[np.int64], Sequence[TrainingChapter]]],
        *,
        bare: Sequence[NDArray[np.int64]] = (),
    ) -> None:
        self._items = [
            (header, chapter.tokens.ids) for header, chapters in logs for chapter in chapters
        ]
        self._items += [(np.zeros(0, dtype=np.int64), text) for text in bare]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        header, ids = self._items[index]
        return {
            "input_ids": np.concatenate([header, ids]),
            "labels": np.concatenate([np.full(len(header), _IGNORED), ids]),
        }


class _Collator:
    """Pads on the right, and counts the tokens that it has seen."""

    def __init__(self, *, pad_id: int) -> None:
        self._pad_id = pad_id
        self.tokens = 0

    def __call__(self, items: Sequence[dict[str, NDArray[np.int64]]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        self.tokens += int(lengths.sum())
        return {
            "input_ids": _pad([item["input_ids"] for item in items], self._pad_id),
            "labels": _pad([item["labels"] for item in items], _IGNORED),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }


class _Bar(TrainerCallback):
    """A progress bar on stderr: steps, loss, tokens per second, time left."""

    def __init__(self, console: Console, collate: _Collator) -> None:
        self._collate = collate
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tok/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the Trainer's signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> None:
        """Show the bar."""
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, loss="-", speed="-")

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the Trainer's signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> None:
        """Advance it."""
        if self._task is None:
            return
        elapsed_s = self._progress.tasks[0].elapsed or 0.0
        speed = f"{self._collate.tokens / elapsed_s:,.0f}" if elapsed_s else "-"
        self._progress.update(self._task, completed=state.global_step, speed=speed)

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **kwargs: object,  # noqa: ARG002
    ) -> None:
        """Show the loss."""
        if self._task is not None and logs and "loss" in logs:
            self._progress.update(self._task, loss=f"{logs['loss']:.3f}")

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> None:
        """Leave it standing."""
        self._progress.stop()


def _pad(rows: Sequence[NDArray[np.int64]], value: int) -> torch.Tensor:
    """Ragged rows to (B, L) int64, padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(row)
    return padded


def _pad_id(model: PreTrainedModel) -> int:
    """Any id will do: padding is masked, and its loss left out."""
    found = model.config.pad_token_id
    return int(found) if found is not None else 0


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
