"""The model card of a bundle: what a person should know before reading its vectors."""

from huggingface_hub import ModelCard, ModelCardData

from llm4es.bundle import Compute, Manifest

__all__ = ["model_card"]

_CARD = """\
---
{metadata}
---

# {entity} embeddings, bundle {id}

One vector of {dim} numbers per {entity}: means of hidden states ({layers}) of a causal language
model over the rendered history, at half-lives of {scales} events. Method: LLM4ES (arXiv
2508.05688).

| | |
|---|---|
| base model | {base_model} |
| trained on | log with SHA-256 `{data}`, {steps} steps, {epochs:g} epochs |
| loss, nats per token | training {train_loss}, held-out entities {held_out_loss} |
| chapters | an anchor every {chapter_events} events on average, at most {max_tokens} tokens |
| surprise | {surprise} |
| computed in | {compute} |
| parity with transformers, relative | {parity} |
| why so | {why} |

What the model reads first, before every chapter:

```
{header}
```

## Limits
Vectors of two bundles must never be mixed. The model has seen the training entities' events:
judge it on entities and times that it has not. It is meant for features of models that are
themselves evaluated, not for decisions about a {entity} by itself. Surprise is relative to this
log: it grows when behaviour or data drift.
"""


def model_card(manifest: Manifest, header: str) -> str:
    """Write a model card in Markdown with the metadata that Hugging Face reads."""
    facts = ModelCardData(
        license=manifest.licence if manifest.licence.islower() else "other",
        library_name="onnx",
        pipeline_tag="feature-extraction",
        tags=["llm4es", "event-sequences", "user-embeddings"],
    )
    training, pooling = manifest.training, manifest.pooling
    text = _CARD.format(
        metadata=facts.to_yaml(),
        entity=manifest.entity,
        id=manifest.id,
        dim=manifest.dim,
        layers=f"layers {', '.join(map(str, pooling.layers))} {pooling.combine.replace('_', ' ')}",
        scales=", ".join(f"{scale:g}" for scale in pooling.scales),
        base_model=manifest.base_model,
        data=training.data_sha256[:12],
        steps=training.steps,
        epochs=training.epochs,
        train_loss=_loss(training.train_loss),
        held_out_loss=_loss(training.held_out_loss),
        chapter_events=manifest.window.chapter_events,
        max_tokens=manifest.window.max_chapter_tokens,
        surprise="none"
        if manifest.surprise is None
        else "in all and by field, above its mean by depth, in nats",
        compute=_computed(manifest.compute),
        parity=", ".join(f"{name} {value:.1e}" for name, value in manifest.parity.items())
        or "of the bundle it was made from",
        why=manifest.why or "not told",
        header=header.rstrip("\n"),
    )
    return str(ModelCard(text))


def _computed(compute: Compute) -> str:
    told = f"{compute.precision}, keys and values in {compute.cache}"
    judged = compute.judged
    if judged is None:
        return told
    told += f"; std-centred cosine to {judged.origin} {judged.cosine}, 5-NN {judged.neighbours}"
    if judged.auc_loss is not None:
        told += f", ROC-AUC lower by {judged.auc_loss}"
    return f"{told}{', let through by force' if judged.forced else ''}"


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
