"""Profiles are read and checked; every error names the key and what was likely meant."""

import pytest

from dinokit.slurm.profile import Config, find_profile, load_profile, profile_names


@pytest.fixture
def profile_file(tmp_path):
    def write(text):
        path = tmp_path / "ours.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", profile_names())
def test_the_profiles_here_can_be_read_and_name_no_cluster(name):
    profile = load_profile(name, {})
    assert (profile.partition, profile.account, profile.qos, profile.constraint) == ("", "", "", "")


def test_the_command_line_changes_a_profile(profile_file):
    path = profile_file("{hours: 3, gpus: 4, sbatch: {mail-type: END}}")
    profile = load_profile(path, {"gpus": 2, "setup": "module load x"})
    assert (profile.hours, profile.gpus, profile.setup) == (3.0, 2, ["module load x"])
    assert profile.sbatch == {"mail-type": "END"}


@pytest.mark.parametrize(("hours", "minutes"), [(1, 60), (0.5, 30), (1 / 60, 1), (0.0253, 2)])
def test_a_time_limit_is_rounded_up_to_minutes(hours, minutes):
    assert Config(hours=hours, notice=10).minutes == minutes


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("hors: 4", "ours.yaml: hors: there is no key 'hors'. Did you mean 'hours'? There is: partition, "),
        ("gpus: many", "ours.yaml: gpus: 'many' is not a whole number"),
        ("hours: 1-12", "hours=1-12: a number of hours, such as 24 or 0.5. SLURM's 1-12:30:00 is hours=36.5"),
        ("hours: 4:00:00", "write 4"),
        ("hours: 0", "hours=0: a number of hours"),
        ("nodes: 0", "nodes=0, but it must be 1 or more"),
        ("{hours: 0.02, notice: 120}", "notice=120 seconds are all of hours=0.02"),
        ("{venv: a, container: b}", "venv and container are given"),
        ("- a list", "ours.yaml is not a profile: it should hold keys such as partition"),
        ("{", "ours.yaml is not a profile: "),
    ],
)
def test_errors_name_the_key_and_what_was_meant(profile_file, text, answer):
    with pytest.raises(ValueError, match=r"^") as error:
        load_profile(profile_file(text), {})
    assert answer in str(error.value)


def test_an_unknown_profile_is_an_error_that_lists_the_profiles():
    with pytest.raises(LookupError, match=r"no profile 'gup'. Did you mean 'gpu'\? Profiles are: cpu, gpu"):
        find_profile("gup")
    with pytest.raises(LookupError, match=r"no profile file 'a/b.yaml' \(looked from /"):
        find_profile("a/b.yaml")


@pytest.mark.parametrize(
    "text", ['partition: "a\\n#SBATCH --uid=0"', 'sbatch: {mail-user: "x\\nrm -rf ~"}', 'venv: "a\\x1b[2J"']
)
def test_a_control_character_in_a_value_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match="has a control character"):
        load_profile(str(tmp_path / "p.yaml"), {})
