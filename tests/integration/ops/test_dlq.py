"""Dead letters are tried again through the log, once, and only where they would be folded."""

import json
from pathlib import Path

import pytest

from dev.servers import KafkaServer
from stream_worker.ops.dlq import export_letters, list_letters, retry_letters, show_letter
from tests.histories import payment
from tests.integration.ops.worlds import Live

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Stream feature views are experimental:RuntimeWarning"),
]


def test_a_mended_letter_goes_through_the_log(
    kafka_server: KafkaServer,
    tmp_path: Path,
    unique: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = Live(tmp_path / "live", f"dlq-{unique}", kafka=kafka_server)
    monkeypatch.setattr("stream_worker.ops.dlq.load_bundle", lambda _: live.bundle)
    made = [payment("e1", 1, customer="cust-01"), payment("e2", 2, customer="cust-01", amount="x")]
    live.produce(made)
    live.work()
    list_letters(live.settings, as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["field"] == "amount"
    out = tmp_path / "letters.jsonl"
    export_letters(live.settings, out, as_json=True)
    letter = json.loads(out.read_text())
    capsys.readouterr()
    show_letter(live.settings, f"{letter['partition']}:{letter['offset']}", as_json=True)
    assert json.loads(capsys.readouterr().out) == letter

    unmended = retry_letters(live.settings, live.bundle)
    assert (unmended.letters, unmended.still_bad, unmended.produced) == (1, 1, 0)
    import base64  # noqa: PLC0415

    value = json.dumps({**made[1], "amount": 3.5}).encode()
    out.write_text(json.dumps({**letter, "value": base64.b64encode(value).decode()}))
    assert retry_letters(live.settings, live.bundle, repaired=out).produced == 1
    assert live.online_rows()["cust-01"].event_count == 1  # nothing was folded beside the log
    live.work()
    assert live.online_rows()["cust-01"].event_count == 2
    assert retry_letters(live.settings, live.bundle, repaired=out).retried_before == 1
