"""What a process sees that has Feast and not us: `python stock_client.py REPO ENTITY`.

Reads online rows and a training set, and prints them as JSON.
"""

import json
import sys
import warnings
from datetime import UTC, datetime

sys.modules["llm4es"] = None  # type: ignore[assignment] # whatever needs us fails

import pandas as pd  # noqa: E402
from feast import FeatureStore  # noqa: E402


def main(repo: str, entity: str, moment: str) -> None:
    """Print what stock Feast gives for one customer, and for one that nobody knows."""
    warnings.simplefilter("ignore")
    store = FeatureStore(repo_path=repo)
    service = store.get_feature_service("customer_llm4es")
    online = store.get_online_features(
        features=service,
        entity_rows=[{"customer_id": entity}, {"customer_id": "nobody"}],
    ).to_dict()
    view = service.feature_view_projections[0].name
    at = datetime.fromisoformat(moment).astimezone(UTC)
    training = store.get_historical_features(
        entity_df=pd.DataFrame({"customer_id": [entity, entity], "event_timestamp": [at, at]}),
        features=[f"{view}:embedding", f"{view}:last_event_id"],
    ).to_df()
    sys.stdout.write(
        json.dumps(
            {
                "online": [online["embedding"][0], online["last_event_id"]],
                "training": [
                    [float(each) for each in training["embedding"].iloc[0]],
                    training["last_event_id"].tolist(),
                ],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
