"""What is wrong with a settings file is said in one line, with what to do about it."""

from pathlib import Path

import pytest

from stream_worker.settings import SettingsProblem, load_settings


def problem_of(config: Path) -> str:
    with pytest.raises(SettingsProblem) as caught:
        load_settings({}, config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"- max_records\n", "no mapping"),
        (b"512\n", "no mapping"),
        (b"true", "no mapping"),
        (b"512: max_records\n", "no mapping"),
        (b"max_records: \xff\xfe\n", "no YAML in UTF-8"),
        (b"max_records: [\n", "no YAML in UTF-8"),
        (b"max_records: \x00\n", "no YAML in UTF-8"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    config = tmp_path / "settings.yaml"
    config.write_bytes(content)
    said = problem_of(config)
    assert said.startswith(f"config: {config}")
    assert problem in said
    assert "\n" not in said


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in problem_of(tmp_path / "absent.yaml")
    assert "cannot be read (Is a directory" in problem_of(tmp_path)


def test_a_key_that_no_setting_has_is_to_be_taken_out_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("max_recrods: 5\n")
    said = problem_of(config)
    assert said.startswith("max_recrods: ")
    assert "--max-recrods" not in said
    assert said.endswith("take it out of the file; --help names the settings")


def test_a_value_that_does_not_fit_names_its_flag(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("max_records: none\n")
    assert problem_of(config).endswith("give --max-records, see --help")


def test_an_empty_file_and_a_good_one_are_taken(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    for content, due in (("", 512), ("# nothing yet\n", 512), ("max_records: 7\n", 7)):
        config.write_text(content)
        assert load_settings({}, config).max_records == due
