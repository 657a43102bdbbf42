"""Commands that people type: `inspect`, `finetune`, the demo; what they print is real."""

import json
import shutil
from pathlib import Path

from dev.servers import KafkaServer
from llm4es.bundle import load_bundle
from tests.commands import Background, run
from tests.integration.conftest import Sample, apply_repo
from tests.kafka_topics import make_topics


def test_inspect_shows_text_surprise_and_the_online_row_of_a_window(
    bundle_folder: Path, sample: Sample, tmp_path: Path
) -> None:
    repo = apply_repo(tmp_path / "repo", bundle_folder)
    flags = [
        "--bundle", str(bundle_folder), *repo.flags,
        "--window-store", f"sqlite:{tmp_path / 'windows.db'}",
        "--state-dir", str(tmp_path / "state"),
    ]  # fmt: skip
    served = run(
        ["stream_worker", "run", *flags, "--source", "file", "--events", str(sample.events),
         "--recorded-at-field", "recorded_at", "--until-end", "--live"],
    )  # fmt: skip
    assert served.returncode == 0, served.stderr
    customer = sample.customers()[0]
    journal = leave_a_journal(repo.folder / "data" / "offline")
    before = tree(tmp_path)
    told = run(["stream_worker", "inspect", customer, *flags, "--json"])
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    bundle = load_bundle(bundle_folder)
    assert found["bundle"] == found["online"]["bundle"] == bundle.id
    assert found["as_of"] == found["online"]["as_of"]
    assert found["header"] == bundle.renderer.header
    newest = found["chapters"][-1]["events"][-1]
    assert newest["event_id"] == found["online"]["last_event_id"]
    assert abs(newest["surprise"]["all"] - found["online"]["surprise_last"]) < 1e-3
    assert len(found["online"]["embedding"]) == bundle.manifest.dim
    shown = run(["stream_worker", "inspect", customer, *flags], env={"COLUMNS": "200"})
    assert shown.returncode == 0, shown.stderr
    assert newest["text"] in shown.stdout
    assert bundle.id in shown.stdout
    unknown = run(["stream_worker", "inspect", "nobody", *flags])
    assert unknown.returncode == 2
    assert "look at the id" in unknown.stderr
    absent = ["--window-store", f"sqlite:{tmp_path / 'absent' / 'windows.db'}"]
    nothing = run(["stream_worker", "inspect", customer, *flags, *absent])
    assert nothing.returncode == 2
    assert "there is no file" in nothing.stderr
    assert journal.exists()
    assert tree(tmp_path) == before


def leave_a_journal(log: Path) -> Path:
    """What a writer leaves that was killed; who opens the log to write rolls it."""
    (view,) = (path for path in log.iterdir() if path.is_dir())
    journal = view / "_journal" / "left-by-a-killed-writer.journal"
    journal.parent.mkdir(exist_ok=True)
    journal.write_bytes(b"\x00" * 8)
    return journal


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder, but what Python compiles."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def test_an_existing_model_is_trained_further_by_the_same_path(
    bundle_folder: Path, sample: Sample, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(bundle_folder / "model", tmp_path / "somebodys-llama"))
    arguments = [
        "export", "finetune", "--model", str(model), "--events", str(sample.events),
        "--steps", "2", "--json",
    ]  # fmt: skip
    refused = run([*arguments, "--out", str(tmp_path / "refused")])
    assert refused.returncode == 2, refused.stderr
    assert "window.max_chapter_tokens" in refused.stderr  # it reads fewer tokens than a chapter has
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    (model / "config.json").write_text(json.dumps(config))
    done = run([*arguments, "--out", str(tmp_path / "finetuned")])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    bundle = load_bundle(tmp_path / "finetuned")
    assert facts["bundle"] == bundle.id != load_bundle(bundle_folder).id
    assert bundle.manifest.base_model == "somebodys-llama"
    assert bundle.manifest.training.steps == 2


def test_a_bundle_replaces_a_bundle_and_nothing_else(sample: Sample, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    refused = run(
        ["export", "quickstart", "--events", str(sample.events), "--out", str(precious)]
    )  # fmt: skip
    assert refused.returncode == 2
    assert "is no bundle" in refused.stderr
    assert (precious / "thesis.tex").is_file()


def test_a_worker_that_waits_for_records_stops_in_order_on_sigterm(
    kafka_server: KafkaServer, bundle_folder: Path, unique: str, tmp_path: Path
) -> None:
    make_topics(kafka_server, unique)
    repo = apply_repo(
        tmp_path / "repo",
        bundle_folder,
        topic=unique,
        bootstrap_servers=kafka_server.bootstrap_servers,
    )
    worker = Background(
        tmp_path / "worker",
        ["stream_worker", "run", "--bundle", str(bundle_folder), *repo.flags,
         "--window-store", f"sqlite:{tmp_path / 'windows.db'}",
         "--state-dir", str(tmp_path / "state"), "--verbose", "--log-format", "json", "--json"],
    )  # fmt: skip
    with worker:
        worker.wait_for("assigned")
        assert worker.stop() == 0, worker.err.read_text()
    logged = [json.loads(line) for line in worker.err.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, logged))
    assert json.loads(worker.out.read_text())["records"] == 0


def test_the_demo_prints_figures_of_its_own_run(tmp_path: Path) -> None:
    done = run(
        ["examples.demo", "--home", str(tmp_path / "demo"), "--customers", "60", "--days", "60",
         "--steps", "20"],
        env={"COLUMNS": "120"},
        timeout_s=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("ROC-AUC", "+ the embedding and the surprise", "poll to readable, p99", "inspect"):
        assert part in done.stdout
