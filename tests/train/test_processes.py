"""Processes agree before they start, stop together, and fail with the words of the one that failed."""

import pytest

from dinokit.runtime.distributed import cpu_cores, first_host, launch
from dinokit.train.checkpoint import newest

NEITHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    def given(**values):
        for key in NEITHER:
            monkeypatch.delenv(key, raising=False)
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    return given


def test_alone_is_one_process(environment):
    environment()
    assert (launch().rank, launch().world, launch().nodes, launch().by) == (0, 1, 1, "alone")


def test_torchrun_says_who_is_who(environment):
    environment(
        RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1234",
        SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1",
    )  # fmt: skip
    ours = launch()
    assert (ours.rank, ours.world, ours.local_rank, ours.nodes, ours.address, ours.port) == (
        5,
        8,
        1,
        2,
        "a",
        1234,
    )


def test_srun_says_who_is_who(environment):
    environment(
        SLURM_STEP_NUM_TASKS="11", SLURM_PROCID="9", SLURM_LOCALID="1", SLURM_NODEID="2", SLURM_JOB_ID="1234",
        SLURM_STEP_ID="0", SLURM_STEP_TASKS_PER_NODE="4(x2),3", SLURM_STEP_NODELIST="gpu[03-04,9],cpu1",
    )  # fmt: skip
    ours = launch()
    assert (ours.rank, ours.world, ours.local_rank, ours.local_world) == (9, 11, 1, 3)
    assert ours.address == "gpu03"
    assert 1024 < ours.port < 32768
    environment(SLURM_STEP_NUM_TASKS="11", SLURM_STEP_ID="1", MASTER_ADDR="b", MASTER_PORT="99")
    assert (launch().address, launch().port) == ("b", 99)


def test_a_batch_script_outside_of_srun_is_alone(environment):
    environment(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0")
    assert launch().world == 1


def test_half_an_environment_is_named(environment):
    environment(RANK="0", WORLD_SIZE="2")
    with pytest.raises(ValueError, match="RANK=0 is set, but not MASTER_ADDR, MASTER_PORT"):
        launch()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("a-b[007,9-11]-ib,c", "a-b007-ib"),
        ("r[1-2]n[3,4]", "r1n3"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_cores_are_shared_out_on_a_node(environment):
    environment()
    have = cpu_cores()
    environment(RANK="0", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1")
    assert cpu_cores() == max(have // 2, 1)


@pytest.fixture
def overrides(photos, tmp_path):
    return [f"data.path={photos}", f"run.out={tmp_path / 'out'}"]


def test_a_signal_to_one_stops_all_after_the_same_step(recipe_file, overrides, together, tmp_path):
    output = together(
        2, "stop_after", str(recipe_file), [*overrides, "run.checkpoint_every=100"], 3, status=(130,)
    )
    assert output == ""
    assert newest(tmp_path / "out" / "checkpoints").step == 3


def test_a_failure_is_reported_once_by_the_process_that_failed_and_ends_all(recipe_file, overrides, together):
    # `together` waits for 5 minutes at most, not for the half hour of run.timeout_minutes
    output = together(2, "fail_in_one", str(recipe_file), overrides, status=(1, 2))
    assert output.startswith("process 1 of 2")
    assert output.count("Traceback") == 1
    assert "in failing_step" in output
    assert output.count("ERROR RuntimeError: a bug in one process") == 1


@pytest.mark.parametrize(("how", "status"), [("done", 0), ("stopped", 130)])
def test_no_thread_is_left_in_the_store_when_the_interpreter_ends(together, how, status):
    """There it would end the process with SIGABRT, whatever had been done."""
    output = together(2, "leave", how, status=(status,))
    assert output == 2 * "left: []\n"


def test_after_a_failure_only_a_clock_is_left(together):
    output = together(2, "leave", "failed", status=(1, 2))
    assert output.count("left: ['Timer']\n") == 2
    assert output.count("this was wrong") == 1


@pytest.mark.slow
def test_a_hang_is_broken_by_the_process_that_hangs_which_shows_where(recipe_file, overrides, together):
    """The one that waits for it has as long, and no clock here; it must not give up first, and guess."""
    output = together(
        2, "hang_in_one", str(recipe_file), [*overrides, "run.timeout_minutes=0.25"], status=(1, 2)
    )
    assert output.startswith("process 1 made no step for run.timeout_minutes=0.25, and exits.")
    assert "in sleep_for_ever" in output


def test_a_process_that_sees_other_images_is_named_at_once(
    recipe_file, overrides, together, photos, tmp_path
):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(photos.iterdir())[:-1]:
        (fewer / path.name).write_bytes(path.read_bytes())
    folders = [str(photos), str(fewer)]
    output = together(2, "see_other_data", str(recipe_file), overrides[1:], folders, status=(1, 2))
    assert output.count("has another number of images than process 0") == 1
    assert ": 9, not 10." in output
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_an_error_at_once(recipe_file, photos, together, tmp_path):
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        out.mkdir()
    given = [f"data.path={photos}", "run.out=run"]
    folders = [str(out) for out in outs]
    output = together(2, "see_other_folder", str(recipe_file), given, folders, status=(1, 2))
    assert output.count("run.out=run is not one folder for all processes") == 1
