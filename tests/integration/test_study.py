"""Enriched training, another pooling of the same weights, and a study from files to reports."""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from export.beside import LogPlace, read_other
from export.build import Request, build_bundle
from export.chapter_texts import other_renderers, training_texts
from export.corpus import read_log
from export.embed import AsOf, embed_as_of
from export.enrich import enrich_by_rule
from export.enriched import read_enriched
from export.finetune import mean_nats
from export.pooling import repool
from export.recipe import Pooled, Recipe, load_recipe
from export.study import Study, study
from llm4es.bundle import Bundle, load_bundle
from llm4es.errors import ConfigError
from llm4es.schema import load_schema
from tests.integration.conftest import Sample
from tests.integration.test_training import write_recipe
from tests.unit.test_datasets import OFFICIAL, made

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    return load_recipe(str(write_recipe(folder / "recipe.yaml", {"training": {"steps": 3}})))


@pytest.fixture(scope="module")
def enriched(sample: Sample, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("enriched") / "enriched.jsonl"
    schema = load_schema(sample.schema)
    log = read_log(sample.events, schema, entity="customer")
    chapters = training_texts(log, schema, recipe, max_events=12)
    done = enrich_by_rule(chapters, other_renderers(log, schema, recipe), out, QUIET)
    assert done.kept == done.chapters > 100
    return out


def build(
    sample: Sample,
    recipe: Recipe,
    out: Path,
    enriched: Path | None = None,
    beside: tuple[LogPlace, ...] = (),
) -> Bundle:
    return build_bundle(
        Request(
            events=sample.events,
            schema=sample.schema,
            entity="customer",
            out=out,
            recipe=recipe,
            enriched=enriched,
            beside=beside,
        ),
        QUIET,
    ).bundle


@pytest.fixture(scope="module")
def bare(sample: Sample, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(sample, recipe, tmp_path_factory.mktemp("bare") / "bundle")


def test_enriched_texts_are_learnt_besides_and_what_is_served_stays_the_base_format(
    sample: Sample, recipe: Recipe, bare: Bundle, enriched: Path, tmp_path: Path
) -> None:
    styles = {json.loads(line)["style"] for line in enriched.read_text().splitlines()}
    assert styles == {"json", "yaml", "html", "markdown", "sentence"}
    both = build(sample, recipe, tmp_path / "both", enriched)
    assert both.manifest.training.data_sha256 != bare.manifest.training.data_sha256
    assert both.renderer.header == bare.renderer.header
    assert both.manifest.rendering == bare.manifest.rendering
    longest = {
        which: max(len(bundle.tokens.encode(json.loads(line)["text"])) for line in lines)
        for which, bundle, lines in (
            ("knows", both, enriched.read_text().splitlines()[:20]),
            ("not", bare, enriched.read_text().splitlines()[:20]),
        )
    }
    assert longest["knows"] < longest["not"], "the tokenizer was trained on them too"


def test_texts_of_another_rendering_or_of_who_is_held_out_are_refused(
    sample: Sample, recipe: Recipe, enriched: Path, tmp_path: Path
) -> None:
    other = recipe.model_copy(
        update={"rendering": recipe.rendering.model_copy(update={"time": ()})}
    )
    with pytest.raises(ConfigError, match="another schema or rendering"):
        build(sample, other, tmp_path / "other", enriched)
    first = json.loads(enriched.read_text().splitlines()[0])
    with pytest.raises(ConfigError, match="must not know"):
        read_enriched(
            enriched,
            rendering=first["rendering"],
            held_out=frozenset({first["entity_id"]}),
            before=None,
        )
    with pytest.raises(ConfigError, match="must not know"):
        read_enriched(
            enriched,
            rendering=first["rendering"],
            held_out=frozenset(),
            before=datetime.fromisoformat(first["until"]),
        )


def test_another_log_is_learnt_with_the_same_tokenizer_and_a_seed_gives_one_bundle(
    sample: Sample, recipe: Recipe, bare: Bundle, tmp_path: Path
) -> None:
    other = made("datafusion", tmp_path)
    place = LogPlace(
        events=other.folder / "events.parquet",
        schema=other.folder / "schema.yaml",
        entity="user",
    )
    both = build(sample, recipe, tmp_path / "both", beside=(place,))
    assert both.manifest.training.data_sha256 != bare.manifest.training.data_sha256
    assert both.renderer.header == bare.renderer.header
    learnt = read_other(place, recipe)
    texts = learnt.corpus(both.tokens, recipe.window), learnt.corpus(bare.tokens, recipe.window)
    lengths = [
        len(text.header_ids) + sum(len(each.tokens.ids) for each in text.chapters) for text in texts
    ]
    assert lengths[0] < lengths[1], "the tokenizer knows the other log too"
    nats = [
        mean_nats(
            AutoModelForCausalLM.from_pretrained(bundle.folder / "model"),
            text.header_ids,
            text.chapters,
        )
        or 0.0
        for bundle, text in zip((both, bare), texts, strict=True)
    ]
    assert nats[0] * lengths[0] < nats[1] * lengths[1], "and so does the model"
    assert build(sample, recipe, tmp_path / "again", beside=(place,)).id == both.id


def test_another_pooling_of_the_same_weights_is_another_bundle(
    sample: Sample, bare: Bundle, tmp_path: Path
) -> None:
    made = repool(bare.folder, Pooled(scales=(float("inf"),), layers=(0,)), tmp_path / "anew")
    assert made.id != bare.id
    assert load_bundle(tmp_path / "anew").manifest.training == bare.manifest.training
    log = read_log(sample.events, bare.schema, entity="customer")
    end = max(history[-1].occurred_at for history in log.histories.values())
    asked = [AsOf(entity_id, end) for entity_id in sorted(log.histories)[:5]]
    before = embed_as_of(bare, log.histories, asked)
    after = embed_as_of(made, log.histories, asked)
    hidden = bare.manifest.hidden_size
    np.testing.assert_allclose(after.vectors, before.vectors[:, :hidden], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="is there"):
        repool(bare.folder, Pooled(), tmp_path / "anew")


def test_the_header_is_pooled_as_the_paper_does(
    sample: Sample, bare: Bundle, tmp_path: Path
) -> None:
    plain = Pooled(scales=(float("inf"),), layers=(-1,))
    with_header = plain.model_copy(update={"pool_header": True})
    bundles = [
        repool(bare.folder, plain, tmp_path / "plain"),
        repool(bare.folder, with_header, tmp_path / "header"),
    ]
    log = read_log(sample.events, bare.schema, entity="customer")
    entity_id, history = next(iter(log.histories.items()))
    asked = [AsOf(entity_id, history[2].occurred_at)]  # two events: one chapter or two
    without, counted = (embed_as_of(each, log.histories, asked).vectors[0] for each in bundles)
    header = bundles[1].arrays["header.states"]
    tokens = sum(len(bare.tokens.tokenize([event]).ids) for event in history[:2])
    size = float(bundles[1].arrays["header.tokens"][0])
    expected = (without * tokens + header) / (tokens + size)
    np.testing.assert_allclose(counted, expected, rtol=1e-3, atol=1e-3)


def test_a_study_goes_from_official_files_to_a_report_on_every_class(tmp_path: Path) -> None:
    (tmp_path / "official").mkdir()
    OFFICIAL["sberbank-age"](tmp_path / "official")
    log = ["client_id,trans_date,small_group,amount_rur"]
    log += [
        f"{client},{day},{(4, 35, 11)[(client * day) % 3]},{10 + client}.5"
        for client in range(20)
        for day in range(3 + client % 5)
    ]
    (tmp_path / "official" / "transactions_train.csv").write_text("\n".join(log))
    chosen = write_recipe(tmp_path / "recipe.yaml", {"training": {"steps": 3}})
    wanted = Study(
        name="sberbank-age",
        taken=tmp_path / "official",
        out=tmp_path / "study",
        recipe=str(chosen),
    )
    found = list(study(wanted, QUIET))
    assert [each.task.name for each in found] == [f"label={value}" for value in range(4)]
    for value in range(4):
        facts = json.loads((tmp_path / "study" / f"age-{value}.json").read_text())
        assert facts["bundle"] == found[0].bundle.id
        assert (tmp_path / "study" / f"age-{value}.html").stat().st_size > 10_000
