"""Enrichment: training chapters in a language model's words, checked, cached and paid for once.

For training alone: what is served is the base format.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile

import yaml
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)

from export.chapter_texts import ChapterText
from export.faithful import judge
from export.paraphrasers import Answer, Ask, Sampling
from llm4es.errors import ConfigError
from llm4es.rendering import Renderer
from llm4es.schema import FrozenModel, canonical_json, first_problem

__all__ = [
    "AnswerCache",
    "Budget",
    "Enriched",
    "Prompts",
    "Wanted",
    "enrich",
    "enrich_by_rule",
    "load_prompts",
]

RULE = "rule"  # what stands in place of a model's name
_SHIPPED = files("export").joinpath("prompts.yaml")


class Prompts(FrozenModel):
    """What a model is asked, by log and style; `task` has places for both."""

    task: str
    rules: str
    summary: str
    no_summary: str
    logs: Mapping[str, str] = Field(min_length=1)
    styles: Mapping[str, str] = Field(min_length=1)

    def ask_for(self, chapter: ChapterText, *, log: str, style: str, summary: bool) -> str:
        """Spell the whole prompt for a chapter. Raises ConfigError for a style there is none of."""
        if style not in self.styles:
            known = ", ".join(self.styles)
            raise ConfigError("style", f"there is no prompt for {style!r}", f"choose from: {known}")
        about = self.logs.get(log, self.logs["other"])
        task = self.task.replace("{log}", about).replace("{style}", self.styles[style])
        closing = self.summary if summary else self.no_summary
        lines = "".join(chapter.lines)
        return f"{task}\n\n{self.rules} {closing}\n\nColumns:\n{chapter.header}\nEvents:\n{lines}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """In which words, and by whom. A chapter's style is drawn from `styles` by its hash."""

    model: str
    ask: Ask
    sampling: Sampling
    prompts: Prompts
    log: str  # the event schema's name
    styles: tuple[str, ...]
    summary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a run may spend; cached answers cost nothing.

    Looked at before each request, with the longest answer added: only an endpoint that counts
    prompts otherwise than we estimate them can pass it, by the requests under way.
    """

    max_requests: int | None = None
    max_tokens: int | None = None


@dataclass(slots=True, kw_only=True)
class Enriched:
    """What came of a run."""

    chapters: int
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    cached: int = 0  # answered without a request
    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    left: int = 0  # not asked for: the budget was spent

    @property
    def tokens(self) -> int:
        """Prompts and answers of this run's requests."""
        return self.prompt_tokens + self.answer_tokens


class AnswerCache:
    """Answers in a folder, one file each, named by the hash of all that decides them.

    A file appears whole, by a rename, so a run that was killed goes on where it was. What the
    model said is kept, not what was made of it: a stricter check costs no request.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def key(model: str, sampling: Sampling, prompt: str) -> str:
        """SHA-256 over model, sampling and the whole prompt, which holds the chapter's text."""
        parts = (model.encode(), canonical_json(sampling), prompt.encode())
        return hashlib.sha256(
            b"\0".join(hashlib.sha256(part).digest() for part in parts)
        ).hexdigest()

    def get(self, key: str) -> Answer | None:
        """Look an answer up; a file that cannot be read counts as none."""
        try:
            return Answer(**json.loads(self._path(key).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, [json.dumps(asdict(answer), ensure_ascii=False)])

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def load_prompts(path: Path | None = None) -> Prompts:
    """Load the shipped prompts, or one's own. Raises ConfigError."""
    source = _SHIPPED if path is None else path
    try:
        prompts = Prompts.model_validate(yaml.safe_load(source.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError("prompts", f"{source} cannot be read ({problem})", "mend it") from error
    except ValidationError as error:
        name, problem = first_problem(error)
        raise ConfigError(f"prompts: {name}", problem, "see export/prompts.yaml") from error
    if "other" not in prompts.logs:
        raise ConfigError("prompts: logs", "has no 'other'", "say what any log is")
    return prompts


def enrich(
    chapters: Sequence[ChapterText],
    wanted: Wanted,
    *,
    cache: AnswerCache,
    budget: Budget,
    out: Path,
    console: Console,
    parallel: int = 1,
) -> Enriched:
    """Ask for every chapter's other words, and write the faithful ones to `out`, a JSONL.

    The file appears whole, when all were asked or the budget is spent; its lines are in the
    chapters' order whatever came first. What was answered before an error stays in the cache.
    """
    enriched = Enriched(chapters=len(chapters))
    styles = [wanted.styles[int(c.sha256, 16) % len(wanted.styles)] for c in chapters]
    prompts = [
        wanted.prompts.ask_for(chapter, log=wanted.log, style=style, summary=wanted.summary)
        for chapter, style in zip(chapters, styles, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    with _progress(console) as progress:
        bar = progress.add_task("enriching", total=len(chapters), told="")
        records: dict[int, str] = {}
        for index, answer in _answers(prompts, wanted, cache, budget, enriched, parallel):
            reason: str | None = answer.ending
            if answer.ending == "stop":
                text, reason = judge(
                    chapters[index].lines,
                    answer.text,
                    labels=chapters[index].labels,
                    summary=wanted.summary,
                )
                if reason is None:
                    records[index] = _record(chapters[index], styles[index], wanted.model, text)
            enriched.dropped.update([] if reason is None else [reason])
            enriched.kept = len(records)
            told = f"{enriched.kept:,} kept, {enriched.tokens:,} tokens"
            progress.update(bar, advance=1, told=told)
    _write_whole(out, [records[index] for index in sorted(records)])
    return enriched


def enrich_by_rule(
    chapters: Sequence[ChapterText],
    renderers: Mapping[str, Renderer],
    out: Path,
    console: Console,
) -> Enriched:
    """Write each chapter in another of our own formats, by its hash: no model, no budget.

    `renderers` are by style. The output is `enrich`'s, and judged alike.
    """
    enriched = Enriched(chapters=len(chapters))
    styles = tuple(renderers)
    records = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for chapter in track(chapters, "enriching", console=console):
        style = styles[int(chapter.sha256, 16) % len(styles)]
        written = "".join(line.text for line in renderers[style].lines(chapter.events))
        text, reason = judge(chapter.lines, written, labels=chapter.labels)
        if reason is None:
            records.append(_record(chapter, style, RULE, text))
        enriched.dropped.update([] if reason is None else [reason])
    enriched.kept = len(records)
    _write_whole(out, records)
    return enriched


def _answers(  # noqa: PLR0917 - each is a part of a run
    prompts: Sequence[str],
    wanted: Wanted,
    cache: AnswerCache,
    budget: Budget,
    enriched: Enriched,
    parallel: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) as they come, from the cache or from the model."""

    def ask(key: str, prompt: str) -> Answer:
        answer = wanted.ask(prompt)
        if answer.ending != "refused":
            cache.put(key, answer)
        return answer

    def settled() -> Iterator[tuple[int, Answer]]:
        done, _ = wait(asked, return_when=FIRST_COMPLETED)
        for future in done:
            answer = future.result()
            enriched.prompt_tokens += answer.prompt_tokens
            enriched.answer_tokens += answer.answer_tokens
            yield from ((index, answer) for index in asked.pop(future))

    asked: dict[Future[Answer], list[int]] = {}
    pool = ThreadPoolExecutor(parallel)
    try:
        for key, indices in _places(prompts, wanted).items():
            if (known := cache.get(key)) is not None:
                enriched.cached += len(indices)
                yield from ((index, known) for index in indices)
                continue
            while len(asked) >= parallel:
                yield from settled()
            prompt = prompts[indices[0]]
            if _spent(budget, enriched, prompt, wanted.sampling, under_way=len(asked)):
                enriched.left += len(indices)
                continue
            enriched.requests += 1
            enriched.cached += len(indices) - 1
            asked[pool.submit(ask, key, prompt)] = indices
        while asked:
            yield from settled()
    finally:
        pool.shutdown(cancel_futures=True)


def _places(prompts: Sequence[str], wanted: Wanted) -> dict[str, list[int]]:
    """By an answer's key, whose answer it is: chapters of one text and style share one."""
    places: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = AnswerCache.key(wanted.model, wanted.sampling, prompt)
        places.setdefault(key, []).append(index)
    return places


def _spent(
    budget: Budget, enriched: Enriched, prompt: str, sampling: Sampling, *, under_way: int
) -> bool:
    if budget.max_requests is not None and enriched.requests >= budget.max_requests:
        return True
    if budget.max_tokens is None:
        return False
    # Two characters a token is an estimate: words take fewer tokens, figures may take more.
    longest = len(prompt) // 2 + sampling.max_answer_tokens
    return enriched.tokens + longest * (under_way + 1) > budget.max_tokens


def _record(chapter: ChapterText, style: str, model: str, text: str) -> str:
    return json.dumps(
        {
            "source": chapter.sha256,
            "rendering": chapter.rendering_sha256,
            "entity_id": chapter.entity_id,
            "first_event": chapter.first_event,
            "last_event": chapter.last_event,
            "until": chapter.until.isoformat(),
            "events": len(chapter.lines),
            "style": style,
            "model": model,
            "text": text,
        },
        ensure_ascii=False,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
    )


def _write_whole(path: Path, lines: Sequence[str]) -> None:
    with NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
    ) as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(file.name, path)  # noqa: PTH105 - NamedTemporaryFile gives a name
