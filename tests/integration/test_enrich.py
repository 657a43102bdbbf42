"""Enrichment against a server that speaks OpenAI's chat format, and a language model of ours."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import SecretStr
from rich.console import Console

from export.chapter_texts import ChapterText, training_texts
from export.corpus import read_log
from export.enrich import (
    AnswerCache,
    Budget,
    Enriched,
    Wanted,
    enrich,
    load_prompts,
)
from export.models import BEGIN, new_llama, train_tokenizer, wrap_tokenizer
from export.paraphrasers import API_KEY_VARIABLE, Ask, Endpoint, Sampling, open_local_model
from export.recipe import Shape, Training, load_recipe
from llm4es.errors import ConfigError, SourceUnavailable
from tests.commands import Background, run
from tests.histories import SCHEMA_YAML, payment, schema, write_jsonl

KEY = "sk-very-secret-4711"
Reply = tuple[int, Mapping[str, str], bytes]  # status, headers, body


def faithful(prompt: str) -> Reply:
    """Say every line anew, as a model would that does what it is told."""
    lines = prompt.split("Events:\n")[1].splitlines()
    return completion("\n".join(f"It was: {line}" for line in lines))


def completion(text: str, *, finish: str = "stop") -> Reply:
    document = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }
    return 200, {}, json.dumps(document).encode()


class ChatServer:
    """An OpenAI-compatible server: scripted replies first, then `speak`."""

    def __init__(self) -> None:
        self.script: deque[Reply | None] = deque()  # None: hang up
        self.speak: Callable[[str], Reply] = faithful
        self.delay_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.keys.append(self.headers.get("Authorization"))
                time.sleep(server.delay_s)
                reply = (
                    server.script.popleft()
                    if server.script
                    else server.speak(body["messages"][0]["content"])
                )
                if reply is None or self.path != "/v1/chat/completions":
                    self.close_connection = True
                    return
                status, headers, data = reply
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that was killed hangs up: that is a test's point."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @contextmanager
    def serving(self) -> Iterator["ChatServer"]:
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer().serving() as chat:
        yield chat


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    documents = [
        payment(f"e{customer}-{at}", 600 * at, customer=f"c{customer}", amount=at + customer / 8)
        for customer in range(6)
        for at in range(20)
    ]
    (folder / "schema.yaml").write_text(SCHEMA_YAML.replace("{g1: groceries}", '{g1: "groceries"}'))
    return write_jsonl(folder / "events.jsonl", documents)


@pytest.fixture(scope="module")
def chapters(log_file: Path) -> list[ChapterText]:
    log = read_log(log_file, schema(), entity="customer")
    return training_texts(log, schema(), load_recipe("quickstart"), max_events=8)


class Run:
    """Enrichment runs that share a cache."""

    def __init__(self, chapters: list[ChapterText], folder: Path) -> None:
        self.chapters = chapters
        self.cache = AnswerCache(folder / "cache")
        self.out = folder / "enriched.jsonl"

    def __call__(
        self, ask: Ask, *, budget: Budget | None = None, parallel: int = 1, model: str = "m"
    ) -> Enriched:
        return enrich(
            self.chapters,
            Wanted(
                model=model,
                ask=ask,
                sampling=Sampling(max_answer_tokens=50),
                prompts=load_prompts(),
                log="shop",
                styles=("json", "sentence"),
            ),
            cache=self.cache,
            budget=budget or Budget(),
            out=self.out,
            console=Console(quiet=True),
            parallel=parallel,
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]


@pytest.fixture
def enriching(chapters: list[ChapterText], tmp_path: Path) -> Run:
    return Run(chapters, tmp_path)


def endpoint(server: ChatServer, **options: Any) -> Endpoint:  # noqa: ANN401 - as they come
    waits: list[float] = []
    return Endpoint(server.url, "m", Sampling(max_answer_tokens=50), sleep=waits.append, **options)


def test_held_out_entities_and_later_events_are_never_enriched(log_file: Path) -> None:
    log = read_log(log_file, schema(), entity="customer")
    recipe = load_recipe("quickstart")
    texts = training_texts(log, schema(), recipe, max_events=8)
    assert len({text.entity_id for text in texts}) < len(log.histories)
    assert max(len(text.lines) for text in texts) <= 8
    cut = texts[0].until.replace(tzinfo=None)
    training = Training.model_validate(recipe.training.model_dump() | {"before": cut})
    early = training_texts(
        log, schema(), recipe.model_copy(update={"training": training}), max_events=8
    )
    assert max(text.until for text in early) < texts[0].until


def test_each_chapter_is_asked_once_in_its_place_and_never_again(
    server: ChatServer, enriching: Run
) -> None:
    server.delay_s = 0.01
    first = enriching(endpoint(server, parallel=3), parallel=3)
    total = len(enriching.chapters)
    assert (first.kept, first.requests, first.cached, first.left) == (total, total, 0, 0)
    assert first.tokens == total * 120
    assert not first.dropped
    records, written = enriching.records, enriching.out.read_bytes()
    assert [record["source"] for record in records] == [c.sha256 for c in enriching.chapters]
    assert {record["style"] for record in records} == {"json", "sentence"}
    assert records[0]["text"].count("\n") == records[0]["events"]
    again = enriching(endpoint(server))
    assert (again.kept, again.requests, again.cached) == (total, 0, total)
    assert enriching.out.read_bytes() == written
    other = enriching(endpoint(server), model="another", budget=Budget(max_requests=0))
    assert (other.cached, other.left) == (0, total)


def test_chapters_of_one_text_are_asked_for_once(server: ChatServer, enriching: Run) -> None:
    enriching.chapters = [enriching.chapters[0]] * 3
    done = enriching(endpoint(server, parallel=3), parallel=3)
    assert (done.kept, done.requests, done.cached, len(server.bodies)) == (3, 1, 2, 1)


def test_what_is_not_faithful_is_dropped_and_counted(server: ChatServer, enriching: Run) -> None:
    server.script.extend(
        [
            completion("I cannot help with that."),
            completion("It was", finish="length"),
            (400, {}, b'{"error": {"message": "context length exceeded"}}'),
            completion(""),
        ]
    )
    done = enriching(endpoint(server))
    assert done.dropped == {"events": 1, "length": 1, "refused": 1, "empty": 1}
    assert done.kept == len(enriching.records) == done.chapters - 4


def test_what_passes_is_tried_again(server: ChatServer, enriching: Run) -> None:
    server.script.extend(
        [
            (429, {"Retry-After": "7"}, b"busy"),
            (500, {}, b"oops"),
            None,
            (200, {}, b"<html>not a chat completion</html>"),
            (200, {}, b'{"choices": []}'),
        ]
    )
    waits: list[float] = []
    ask = Endpoint(server.url, "m", Sampling(max_answer_tokens=50), sleep=waits.append)
    done = enriching(ask)
    assert done.kept == done.requests == done.chapters
    assert waits == [7.0, 2.0, 4.0, 8.0, 16.0]


def test_a_server_that_stays_down_ends_the_run_and_costs_nothing_twice(
    server: ChatServer, enriching: Run
) -> None:
    server.script.extend([faithful_to(enriching.chapters[0]), *[(503, {}, b"")] * 2])
    with pytest.raises(SourceUnavailable, match="503") as raised:
        enriching(endpoint(server, attempts=2))
    assert raised.value.exit_code == 4
    assert not enriching.out.exists()
    done = enriching(endpoint(server))
    assert (done.cached, done.kept) == (1, done.chapters)


def faithful_to(chapter: ChapterText) -> Reply:
    return completion("\n".join(f"It was: {line.strip()}" for line in chapter.lines))


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((401, {}, b"Incorrect API key provided: " + KEY.encode()), API_KEY_VARIABLE),
        ((404, {}, b"no such model"), "no such path, or no model 'm'"),
        ((307, {"Location": "http://127.0.0.1:1/"}, b""), "redirects"),
    ],
)
def test_what_does_not_pass_is_refused_at_once(
    server: ChatServer, enriching: Run, reply: Reply, problem: str
) -> None:
    server.script.append(reply)
    with pytest.raises(ConfigError, match=problem) as raised:
        enriching(endpoint(server, key=SecretStr(KEY)))
    assert KEY not in str(raised.value)
    assert len(server.bodies) == 1


def test_a_refusal_that_repeats_the_key_is_logged_without_it(
    server: ChatServer, enriching: Run, caplog: pytest.LogCaptureFixture
) -> None:
    server.script.append((400, {}, f"bad request with Bearer {KEY}".encode()))
    enriching(endpoint(server, key=SecretStr(KEY)))
    assert server.keys[0] == f"Bearer {KEY}"
    assert "bad request" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_budget_is_kept_and_the_rest_comes_with_the_next(
    server: ChatServer, enriching: Run, parallel: int
) -> None:
    ask = endpoint(server, parallel=parallel)
    first = enriching(ask, budget=Budget(max_requests=3), parallel=parallel)
    assert (first.requests, len(server.bodies), first.kept) == (3, 3, 3)
    assert first.left == first.chapters - 3
    tight = enriching(ask, budget=Budget(max_tokens=900), parallel=parallel)
    assert 0 < tight.tokens <= 900
    assert tight.left > 0
    rest = enriching(ask, parallel=parallel)
    assert rest.kept == rest.chapters
    assert rest.requests == rest.chapters - 3 - tight.requests


def test_an_answer_that_was_cut_off_on_disk_is_asked_for_anew(
    server: ChatServer, enriching: Run, tmp_path: Path
) -> None:
    enriching(endpoint(server))
    victim = next((tmp_path / "cache").rglob("*.json"))
    victim.write_bytes(victim.read_bytes()[:20])
    assert enriching(endpoint(server)).requests == 1


def test_a_killed_command_goes_on_where_it_was(
    server: ChatServer, log_file: Path, tmp_path: Path
) -> None:
    server.delay_s = 0.3
    out = tmp_path / "enriched.jsonl"
    command = [
        "export", "enrich", "--events", str(log_file), "--model", "m", "--endpoint", server.url,
        "--max-events", "8", "--cache", str(tmp_path / "cache"), "--out", str(out),
        "--parallel", "1", "--style", "sentence", "--json",
    ]  # fmt: skip
    env = {API_KEY_VARIABLE: KEY}
    with Background(tmp_path / "killed", command, env=env) as started:
        deadline = time.monotonic() + 60
        while len(server.bodies) < 3:
            assert started.process.poll() is None, started.err.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started.process.kill()
        started.process.wait()
    assert not out.exists()
    server.delay_s = 0.0
    done = run(command, env=env)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["cached"] >= 2
    assert facts["kept"] == facts["chapters"] == len(out.read_text().splitlines())
    # Only what was under way at the kill is asked for twice.
    assert facts["chapters"] <= len(server.bodies) <= facts["chapters"] + 1
    said = done.stdout + done.stderr + started.out.read_text() + started.err.read_text()
    kept = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    assert KEY not in said + kept + out.read_text()
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_model_of_random_weights_is_not_believed(
    chapters: list[ChapterText], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shape = Shape(hidden_size=32, layers=1, heads=2, intermediate_size=64, vocabulary=300)
    tokenizer = train_tokenizer(
        chapters[0].lines, chapters[0].header, separators=", ", vocabulary=300
    )
    torch.manual_seed(7)
    new_llama(
        shape,
        vocabulary=tokenizer.get_vocab_size(),
        positions=4096,
        bos_id=tokenizer.token_to_id(BEGIN),
    ).save_pretrained(folder)
    wrap_tokenizer(tokenizer).save_pretrained(folder)
    enriching = Run(chapters[:3], tmp_path)
    name, ask = open_local_model(str(folder), Sampling(max_answer_tokens=50))
    done = enriching(ask, model=name)
    assert name.startswith("model@")
    assert (done.kept, done.requests, sum(done.dropped.values())) == (0, 3, 3)
    assert done.answer_tokens > 0
    assert enriching.records == []
    assert ask("one") == ask("one") != ask("another")
    assert enriching(ask, model=name).cached == 3
