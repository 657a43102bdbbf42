"""CoLES (arXiv 2002.08232) as a baseline: the only module that imports pytorch-lifestream."""

import logging
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from export.embed import AsOf
from llm4es.errors import ConfigError
from llm4es.events import Event, FieldValue
from llm4es.schema import EventSchema, NumberField

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own making
        import pytorch_lightning
        from ptls.data_load.padded_batch import PaddedBatch
        from ptls.frames.coles import CoLESModule
        from ptls.frames.coles.coles_dataset import ColesDataset
        from ptls.frames.coles.split_strategy import SampleSlices
        from ptls.nn import RnnSeqEncoder, TrxEncoder
except ImportError as error:
    raise ConfigError(
        "coles",
        f"pytorch-lifestream cannot be imported ({error})",
        "install the extra `coles`: pip install 'llm4es[cpu,train,coles]'",
    ) from error

__all__ = ["Coles"]

Histories = Mapping[str, Sequence[Event]]

_HIDDEN = 128
_CODE_SIZE = 16
_CODES = 1000  # most frequent values of a field; the others share one code
_STEPS = 400
_BATCH = 64
_SLICES, _SHORTEST, _LONGEST = 5, 10, 120
_LEARNING_RATE = 1e-3
_DAY = 86_400.0
_TYPE = "event type"
_NONE, _OTHER = 1, 2  # 0 pads


class Coles:
    """A GRU trained to tell whose slice of a history it reads, on all histories, unlabelled.

    Its state after an event is the embedding as of then: it is causal, so one pass over a history
    gives every moment's.
    """

    def __init__(
        self, schema: EventSchema, histories: Histories, *, seed: int, steps: int = _STEPS
    ) -> None:
        pytorch_lightning.seed_everything(seed, verbose=False)
        self._numbers: list[tuple[str, str]] = []
        self._codes: dict[tuple[str, str], dict[str, int]] = {}
        for kind, spec in schema.types.items():
            for name, field in spec.fields.items():
                if isinstance(field, NumberField):
                    self._numbers.append((kind, name))
                else:
                    self._codes[kind, name] = _frequent(histories, kind, name)
        self._types = {kind: index + 1 for index, kind in enumerate(schema.types)}
        self._encoder: Any = RnnSeqEncoder(
            trx_encoder=TrxEncoder(
                embeddings={
                    _TYPE: {"in": len(self._types) + 1, "out": _CODE_SIZE},
                    **{
                        _code_name((kind, name)): {"in": len(codes) + _OTHER + 1, "out": _CODE_SIZE}
                        for (kind, name), codes in self._codes.items()
                    },
                },
                numeric_values=dict.fromkeys(
                    ("gap", "hour sin", "hour cos", *map(_number_name, self._numbers)), "identity"
                ),
            ),
            hidden_size=_HIDDEN,
            type="gru",
        )
        self._train(histories, steps)

    def matrix(self, histories: Histories, asked: Sequence[AsOf]) -> NDArray[np.float32]:
        """Embeddings (N, 128): of the events before each moment; zeros where there are none."""
        found = np.zeros((len(asked), _HIDDEN), dtype=np.float32)
        rows: dict[str, list[int]] = {}
        for row, one in enumerate(asked):
            rows.setdefault(one.entity_id, []).append(row)
        self._encoder.eval()
        self._encoder.is_reduce_sequence = False
        for entity_id, wanted in rows.items():
            history = histories.get(entity_id, ())
            if not history:
                continue
            features = {name: column[None] for name, column in self._features(history).items()}
            with torch.no_grad():
                batch = PaddedBatch(features, torch.tensor([len(history)]))
                states = self._encoder(batch).payload[0].numpy()
            times = [event.occurred_at for event in history]
            for row in wanted:
                end = bisect_left(times, asked[row].before)
                if end:
                    found[row] = states[end - 1]
        return found

    def _train(self, histories: Histories, steps: int) -> None:
        data = [
            self._features(history)
            for history in histories.values()
            if len(history) >= 2 * _SHORTEST
        ]
        if len(data) < 2 * _SLICES:
            raise ConfigError("coles", f"{len(data)} histories are long enough", "use a larger log")
        loader = DataLoader(
            ColesDataset(data, SampleSlices(_SLICES, _SHORTEST, _LONGEST)),
            batch_size=min(_BATCH, len(data)),
            shuffle=True,
            collate_fn=ColesDataset.collate_fn,
        )
        module = CoLESModule(
            seq_encoder=self._encoder,
            optimizer_partial=partial(torch.optim.Adam, lr=_LEARNING_RATE),
            lr_scheduler_partial=partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.8),
        )
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library's own making
            pytorch_lightning.Trainer(
                max_steps=steps,
                max_epochs=-1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, loader)

    def _features(self, history: Sequence[Event]) -> dict[str, torch.Tensor]:
        """Columns (events,) as the library reads them."""
        seconds = np.array([event.occurred_at.timestamp() for event in history])
        hours = 2 * np.pi * (seconds % _DAY) / _DAY
        floats = {
            "gap": np.log1p(np.diff(seconds, prepend=seconds[0]) / _DAY),
            "hour sin": np.sin(hours),
            "hour cos": np.cos(hours),
            "event_time": seconds - seconds[0],
        }
        for kind, name in self._numbers:
            values = [
                float(value)
                if event.type == kind and isinstance(value := event.fields.get(name), int | float)
                else 0.0
                for event in history
            ]
            floats[_number_name((kind, name))] = np.sign(values) * np.log1p(np.abs(values))
        codes = {_TYPE: [self._types[event.type] for event in history]}
        for (kind, name), known in self._codes.items():
            codes[_code_name((kind, name))] = [
                known.get(_text(event.fields.get(name)), _OTHER) if event.type == kind else _NONE
                for event in history
            ]
        return {
            **{name: torch.tensor(column, dtype=torch.float32) for name, column in floats.items()},
            **{name: torch.tensor(column) for name, column in codes.items()},
        }


def _code_name(key: tuple[str, str]) -> str:
    return f"code {key[0]} {key[1]}".replace(".", "_")  # a module of torch has no dots


def _number_name(key: tuple[str, str]) -> str:
    return f"number {key[0]} {key[1]}".replace(".", "_")


def _frequent(histories: Histories, kind: str, name: str) -> dict[str, int]:
    counted = Counter(
        _text(event.fields.get(name))
        for history in histories.values()
        for event in history
        if event.type == kind
    )
    return {
        value: code for code, (value, _) in enumerate(counted.most_common(_CODES), start=_OTHER + 1)
    }


def _text(value: FieldValue) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
