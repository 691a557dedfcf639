"""Layering and telling: who wins, and what a wrong configuration is answered with, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypha.config.models import DataConfig, GatewayConfig, NodeConfig, SchedulerConfig, WorkerConfig
from hypha.config.reading.loading import Flag, load_config, parse_setting
from hypha.errors import ConfigError, Problem

GOOD = """\
cert_pem = "w-cert.pem"
key_pem = "w-key.pem"
trust_pem = "w-trust.pem"
gateway_addresses = ["/ip4/192.0.2.1/tcp/8080"]
"""


def write(path: Path, text: str) -> Path:
    file = path / "config.toml"
    file.write_text(text)
    return file


def problems(model: type[NodeConfig], file: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(model, file, environ=environ or {})
    assert caught.value.exit_code == 2
    where = f"{file.parent}/" if file is not None else "/"
    return [str(problem).replace(where, "") for problem in caught.value.problems]


def test_a_good_file(tmp_path: Path) -> None:
    config = load_config(WorkerConfig, write(tmp_path, GOOD), environ={})
    assert config.gateway_addresses == ["/ip4/192.0.2.1/tcp/8080"]
    assert config.cert_pem == tmp_path / "w-cert.pem", "relative to the file"
    assert config.resources.memory == 8.0


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """\
cert-pem = "a-cert.pem"
key_pem = "k.pem"
trust_pm = "t.pem"
gateway_addresses = ["/ip4/10.0.0.1/tcp/1",
   "/ip4/foo"]
log_level = "loud"
exclude_cidr = ["10.0.0.0/8", "10.0.0.300/8"]

[resources]
memory = -3
cpu = "many"
listen_addresses = []

[[executors]]
class = "trian"
name = "x"
args = [
  "a",
  3,
]
""",
    )
    assert problems(WorkerConfig, file) == [
        "config.toml: trust_pem: it is required and not set",
        "config.toml:3: trust_pm: there is no such key; did you mean trust_pem?",
        "config.toml:4: gateway_addresses[0]: the gateway 10.0.0.1 is inside 10.0.0.0/8 of exclude_cidr "
        "and would never be dialled; set exclude_cidr without that network",
        "config.toml:5: gateway_addresses[1]: '/ip4/foo' is no multiaddr (Invalid MultiAddr '/ip4/foo': base "
        "address 'foo' is not IPv4 (string: /ip4/foo)); it should be one such as /ip4/192.0.2.1/tcp/8080 or "
        "/dns4/gateway.example.org/tcp/8080",
        "config.toml:6: log_level: 'loud' is no log level; write error, warn, info, debug, trace or off, or "
        "name=level",
        "config.toml:7: exclude_cidr[1]: it is no network such as 10.0.0.0/8: '10.0.0.300/8' does not appear "
        "to be an IPv4 or IPv6 network",
        "config.toml:10: resources.memory: it should be greater than or equal to 0, not -3",
        "config.toml:11: resources.cpu: it should be a valid number, unable to parse string as a number, not "
        "'many'",
        "config.toml:12: resources.listen_addresses: it belongs to the top level: write it above the first "
        "[table]",
        "config.toml:15: executors[0].class: it should be 'train' or 'aggregate', not 'trian'",
        "config.toml:19: executors[0].args[1]: it should be a valid string, not 3",
    ]


def test_a_missing_file_is_named_and_hides_nothing_else(tmp_path: Path) -> None:
    assert problems(WorkerConfig, tmp_path / "nowhere.toml") == [
        "nowhere.toml: there is no such file; write one with `init`, or correct --config"
    ]


@pytest.mark.parametrize(("text", "line"), [("a = 1\nb = \n", 2), ("a = 1\na = 2\n", 2), ('\n\na = "x', 3)])
def test_broken_toml_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    (told,) = problems(WorkerConfig, write(tmp_path, text))
    assert told.startswith(f"config.toml:{line}: it is not TOML, ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "a = 1\nname = yes\n",
            "config.toml:2: it is not TOML, column 8: Invalid value in `name = yes`; a value is a",
        ),
        (
            'path = "a" or "b"',
            "config.toml:1: it is not TOML, column 12: Expected newline or end of document after a statement "
            'in `path = "a" or "b"`; one `key = value` a line',
        ),
        (
            "a = [1, 2\n\n",
            "config.toml:1: it is not TOML, at its end: Unclosed array in `a = [1, 2`; the list",
        ),
        ("[table\na = 1", "config.toml:1: it is not TOML, column 7: Expected ']' at the end of a table"),
        ("", None),
    ],
)
def test_broken_toml_is_told_with_the_line_and_what_is_expected(
    tmp_path: Path, text: str, told: str | None
) -> None:
    found = problems(WorkerConfig, write(tmp_path, text))
    assert any(one.startswith(told) for one in found) if told else "TOML" not in str(found)


def test_a_line_of_broken_toml_that_holds_a_secret_is_not_shown(tmp_path: Path) -> None:
    (told,) = problems(WorkerConfig, write(tmp_path, "hub_token = hf_abc\n"))
    assert "in `hub_token = ...`" in told
    assert "hf_abc" not in told


def test_a_file_that_is_a_directory_or_not_text(tmp_path: Path) -> None:
    assert "cannot be read" in problems(WorkerConfig, tmp_path)[0]
    file = tmp_path / "latin.toml"
    file.write_bytes(b"a = '\xe9'")
    assert problems(WorkerConfig, file) == ["latin.toml: it is not UTF-8 text"]


def test_one_key_in_two_spellings_is_an_error(tmp_path: Path) -> None:
    told = problems(WorkerConfig, write(tmp_path, 'key-pem = "x"\n' + GOOD))
    assert told == ["config.toml:3: key_pem: it is set twice, in two spellings"]


def test_hyphens_everywhere(tmp_path: Path) -> None:
    text = GOOD.replace("_", "-") + "work-dir = '/w'\n[offer]\ntemporary-lease-s = 7\n"
    config = load_config(WorkerConfig, write(tmp_path, text), environ={})
    assert (config.work_dir, config.offer.temporary_lease_s) == (Path("/w"), 7)


def test_text_in_place_of_a_table(tmp_path: Path) -> None:
    assert problems(WorkerConfig, write(tmp_path, 'limits = "cgroup"\n' + GOOD)) == [
        "config.toml:1: limits: it should be a valid dictionary or instance of WorkerLimitsConfig, not "
        "'cgroup'"
    ]


def test_hours_of_caps(tmp_path: Path) -> None:
    hours = '[[limits.schedule]]\nfrom = {}\nto = "24:00"\nupload_mbit = 5\n'
    for clock in ('"8:00"', "08:00:00"):
        config = load_config(WorkerConfig, write(tmp_path, GOOD + hours.format(clock)), environ={})
        assert (config.limits.schedule[0].start, config.limits.schedule[0].to) == ("08:00", "24:00")
    for wrong in ('"24:01"', '"8:60"', '"8"', "8"):
        (told,) = problems(WorkerConfig, write(tmp_path, GOOD + hours.format(wrong)))
        assert 'limits.schedule[0].from: it should be a time of day such as "08:00"' in told


def test_tuning_that_does_not_fit_together(tmp_path: Path) -> None:
    text = """
[tuning.gossip]
degree = 8
degree_low = 9
[tuning.connections]
unproven_per_address = 300
[tuning.liveness]
reconnect_min_s = 40
round_trip_s = 2
silence_s = 0.5
[[limits.schedule]]
from = "08:00"
to = "08:00"
"""
    told = problems(WorkerConfig, write(tmp_path, GOOD + text))
    start = len(GOOD.splitlines())
    assert [(int(one.split(":")[1]) - start, one.split(": ", 1)[1]) for one in told] == [
        (4, "tuning.gossip.degree_low: it is more than tuning.gossip.degree (8)"),
        (6, "tuning.connections.unproven_per_address: it is more than tuning.connections.unproven (256)"),
        (8, "tuning.liveness.reconnect_min_s: it is more than tuning.liveness.reconnect_max_s (30)"),
        (10, "tuning.liveness.silence_s: it should be greater than or equal to 1, not 0.5"),
        (11, 'limits.schedule[0]: it begins and ends at 08:00; for the whole day write "00:00" to "24:00"'),
        (11, "limits.schedule[0]: it changes nothing; set upload_mbit or download_mbit"),
    ]


def test_a_lease_outlives_its_renewal(tmp_path: Path) -> None:
    text = "[offer]\nlease_s = 30\n[tuning.liveness]\nround_trip_s = {}\n"
    load_config(WorkerConfig, write(tmp_path, GOOD + text.format(2.5)), environ={})
    told = problems(WorkerConfig, write(tmp_path, GOOD + text.format(8)))
    assert [one.split(": ", 1)[1] for one in told] == [
        "offer.temporary_lease_s: an offer would be over before it is accepted: it must be 2 times "
        "tuning.liveness.round_trip_s (8 s), 16 s at least, not 5",
        "offer.lease_s: a renewal would come too late: it must be 4 times "
        "tuning.liveness.round_trip_s (8 s), 32 s at least, not 30",
    ]


# --- precedence -----------------------------------------------------------------------------------------


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "[resources]\nmemory = 1\ncpu = 2\nstorage = 3\n")
    environ = {"HYPHA_RESOURCES__MEMORY": "10", "HYPHA_RESOURCES__CPU": "20"}
    config = load_config(WorkerConfig, file, [Flag("--cpu", "resources.cpu", 200)], environ)
    assert (config.resources.storage, config.resources.memory, config.resources.cpu) == (3, 10, 200)


def test_values_in_the_environment_are_toml_or_json_or_text() -> None:
    environ = {
        "HYPHA_CERT_PEM": "c.pem",
        "HYPHA_KEY_PEM": '"k.pem"',
        "HYPHA_TRUST_PEM": "10",
        "HYPHA_GATEWAY_ADDRESSES": "['/ip4/192.0.2.1/tcp/1']",
        "HYPHA_OFFER": '{"price": 3, "floor": null}'.replace("null", "1"),
        "HYPHA_RELAY_CIRCUIT": "false",
        "HYPHA_EXECUTORS": '[{"class": "train", "name": "a"}]',
        "HYPHA_LOG_LEVEL": "debug",
    }
    config = load_config(WorkerConfig, environ=environ)
    assert (config.cert_pem, config.key_pem, config.trust_pem) == (Path("c.pem"), Path("k.pem"), Path("10"))
    assert config.gateway_addresses == ["/ip4/192.0.2.1/tcp/1"]
    assert (config.offer.price, config.offer.floor, config.relay_circuit) == (3, 1, False)
    assert (config.executors[0].kind, config.log_level) == ("train", "debug")


def test_one_entry_of_a_list_by_its_number(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + '[[executors]]\nclass = "train"\nname = "a"\n')
    environ = {
        "HYPHA_EXECUTORS__0__NAME": "b",
        "HYPHA_EXECUTORS__1__CLASS": "aggregate",
        "HYPHA_EXECUTORS__1__NAME": "7",
    }
    config = load_config(WorkerConfig, file, environ=environ)
    assert [(one.kind, one.name) for one in config.executors] == [("train", "b"), ("aggregate", "7")]


def test_problems_name_the_variable_or_flag_they_come_from(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    environ = {"HYPHA_OFFER__PRICE": "-2", "HYPHA_GATEWY_ADDRESSES": "x"}
    assert problems(WorkerConfig, file, environ) == [
        "HYPHA_GATEWY_ADDRESSES: there is no such key; did you mean HYPHA_GATEWAY_ADDRESSES?",
        "HYPHA_OFFER__PRICE: offer.price: it should be greater than or equal to 0, not -2",
    ]
    with pytest.raises(ConfigError, match=r"^--cpu: resources\.cpu: it should be"):
        load_config(WorkerConfig, file, [Flag("--cpu", "resources.cpu", -1)], {})


def test_variables_of_other_components_are_no_mistake(tmp_path: Path) -> None:
    load_config(WorkerConfig, write(tmp_path, GOOD), environ={"HYPHA_DATASET_PATH": "/d"})


def test_the_log_filter_of_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + 'log_level = "error"\n')

    def level(environ: dict[str, str]) -> str:
        return load_config(WorkerConfig, file, environ=environ).log_level

    assert level({}) == "error"
    assert level({"RUST_LOG": "hypha=info"}) == "hypha=info"
    assert level({"RUST_LOG": "hypha=info", "HYPHA_LOG": "debug"}) == "debug"
    for variable in ("RUST_LOG", "HYPHA_LOG"):
        assert problems(WorkerConfig, file, {variable: "info,hypha_network=loud"}) == [
            f"{variable}: log_level: 'hypha_network=loud' is no log level; write error, warn, info, debug, "
            "trace or off, or name=level"
        ]


def test_settings_of_the_command_line() -> None:
    assert parse_setting(WorkerConfig, "resources.memory=4") == Flag(
        "--set resources.memory", "resources.memory", 4
    )
    assert parse_setting(WorkerConfig, "work-dir=10").value == "10", "a path stays text"
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_setting(WorkerConfig, "memory")


# --- checks between keys --------------------------------------------------------------------------------


def test_paths_and_places_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    job = """
[scheduler.job]
output = "out"
model = { type = "image-classification", path = "m" }
dataset = { dataset = "d" }
rounds = { inner_steps = 5 }
checkpoint = { place = "checkpoints" }
"""
    config = load_config(SchedulerConfig, write(tmp_path, GOOD + job), environ={}).scheduler.job
    assert config.output == str(tmp_path / "out")
    assert config.checkpoint.place == str(tmp_path / "checkpoints")
    assert config.model.path == tmp_path / "m"
    url = job.replace('"out"', '"s3://bucket/x"').replace('"checkpoints"', '"scheduler"')
    config = load_config(SchedulerConfig, write(tmp_path, GOOD + url), environ={}).scheduler.job
    assert (config.output, config.checkpoint.place) == ("s3://bucket/x", "scheduler")


def test_impatience_that_would_kill_healthy_executors(tmp_path: Path) -> None:
    text = """
hang_s = 1
[[executors]]
class = "train"
name = "a"
hang_s = 2
"""
    told = problems(WorkerConfig, write(tmp_path, GOOD + text))
    assert len(told) == 2
    assert all("hang_s: healthy executors would be taken for hung" in problem for problem in told)
    never = load_config(
        WorkerConfig, write(tmp_path, GOOD + text.replace("1", "0").replace("2", "0")), environ={}
    )
    assert (never.hang_s, never.executors[0].hang_s) == (0.0, 0.0)


def test_accelerate_is_for_the_training_executor_of_hypha_and_its_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("num_processes: 2")
    text = """
[[executors]]
class = "train"
name = "a"
accelerate = "two.yaml"
[[executors]]
class = "train"
name = "b"
accelerate = "none.yaml"
[[executors]]
class = "train"
name = "c"
cmd = "mine"
accelerate = "two.yaml"
[[executors]]
class = "aggregate"
name = "d"
accelerate = "two.yaml"
"""
    told = problems(WorkerConfig, write(tmp_path, GOOD + text))
    assert ["executors[1].accelerate" in told[0], "there is no file" in told[0]] == [True, True]
    assert all(
        f"executors[{number}].accelerate: it is for" in one
        for number, one in zip((2, 3), told[1:], strict=True)
    )


def test_patterns_of_urls_that_would_match_nothing_or_too_much(tmp_path: Path) -> None:
    text = """
[allow]
uri = ["https://good.org/*", "https://good.org*", "good.org"]
local-read = ["/data/*", "s3://bucket*"]
local-write = ["s3://bucket/*"]
trust-remote-code = ["acme/*", "https://g?od.org/x"]
[[executors]]
class = "train"
name = "a"
read-only = ["/opt/a"]
"""
    told = problems(WorkerConfig, write(tmp_path, GOOD + text))
    assert len(told) == 5
    keys = ("uri[1]", "uri[2]", "local_read[1]", "trust_remote_code[1]", "executors[0].read_only")
    assert all(any(key in one for one in told) for key in keys), told
    isolated = text.replace("name =", 'runtime = "bwrap"\nname =').replace('"/opt/a"', '"opt/a"')
    assert any(
        "must be an absolute path" in one for one in problems(WorkerConfig, write(tmp_path, GOOD + isolated))
    )


def test_a_contradictory_job(tmp_path: Path) -> None:
    job = """\
[scheduler.job]
output = "out"
model = { type = "torch", path = "nowhere" }
preprocessor = { type = "auto" }
dataset = { dataset = "d" }
rounds = { max_batch_size = 4, batch_size = 8 }
schedule = { type = "wsd" }
[scheduler.job.resources]
num_workers = 2
min_workers = 3
worker_price = { bid = 2, max = 1 }
"""
    told = problems(SchedulerConfig, write(tmp_path, GOOD + job))
    assert [line.removeprefix("config.toml:").split(": ")[:2] for line in told] == [
        ["7", "scheduler.job.model.type"],
        ["7", "scheduler.job.model.path"],
        ["8", "scheduler.job.preprocessor"],
        ["10", "scheduler.job.rounds"],
        ["10", "scheduler.job.rounds.batch_size"],
        ["11", "scheduler.job.schedule.training_steps"],
        ["14", "scheduler.job.resources.min_workers"],
        ["15", "scheduler.job.resources.worker_price.bid"],
    ]


@pytest.mark.parametrize(
    ("task", "executor", "told"),
    [
        ("image-clasification", "diloco-transformer", "did you mean image-classification?"),
        ("telepathy", "diloco-transformer", "known are torch, audio-classification"),
        ("vison2-seq", "diloco-transformer", None),
        ("telepathy", "another", None),
    ],
)
def test_the_task_of_a_model(tmp_path: Path, task: str, executor: str, told: str | None) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    file = write(
        tmp_path,
        f"""[scheduler.job]
model = {{ type = "{task}", path = "m" }}
dataset = {{ dataset = "d" }}
resources = {{ worker_executor = "{executor}" }}
""",
    )
    found = [one for one in problems(SchedulerConfig, file) if "scheduler.job.model.type" in one]
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "should be a JSON object")],
)
def test_a_model_directory_that_describes_no_model(tmp_path: Path, text: str | None, told: str) -> None:
    (tmp_path / "m").mkdir()
    if text is not None:
        (tmp_path / "m" / "config.json").write_text(text)
    job = """
[scheduler.job]
output = "out"
model = { type = "image-classification", path = "m" }
dataset = { dataset = "d" }
rounds = { inner_steps = 5 }
"""
    (problem,) = problems(SchedulerConfig, write(tmp_path, GOOD + job))
    assert "scheduler.job.model.path: " in problem
    assert told in problem


def test_datasets(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert problems(DataConfig, write(tmp_path, GOOD)) == [
        "config.toml: datasets: there is no dataset to serve; set dataset_path, or add a [[datasets]] table"
    ]
    twice = (
        GOOD + '[[datasets]]\npath = "a"\n[[datasets]]\npath = "b"\nname = "a"\n[[datasets]]\npath = "c"\n'
    )
    told = problems(DataConfig, write(tmp_path, twice))
    assert told == [
        "config.toml:7: datasets[1]: two datasets are called 'a'; give one of them another `name`",
        "config.toml:11: datasets[2].path: c is no directory; make one with `hypha-data prepare`",
    ]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("/ip4/192.0.2.1/udp/8080/quic-v1", "no TCP address"),
        ("/ip4/192.0.2.1", "no TCP address"),
        ("192.0.2.1:8080", "no multiaddr"),
        ("/ip4/192.0.2.1/tcp/99999", "no multiaddr"),
        ("/ip4/192.0.2.1/tcp/8080/ws", "goes on after the port"),
    ],
)
def test_addresses_nobody_can_dial(tmp_path: Path, address: str, told: str) -> None:
    text = GOOD.replace("gateway_addresses", "external_addresses") + f'listen_addresses = ["{address}"]\n'
    (line,) = problems(GatewayConfig, write(tmp_path, text))
    assert line.startswith("config.toml:5: listen_addresses[0]: ")
    assert told in line


def test_further_checks_see_what_is_valid_and_are_placed(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "max_connections = 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(
            WorkerConfig,
            file,
            environ={},
            checks=[lambda partial: [Problem("key_pem", f"bad {partial.get('max_connections')}", "/k.pem")]],
        )
    assert [str(problem) for problem in caught.value.problems] == [
        f"{file}:2: key_pem: /k.pem: bad None",
        f"{file}:5: max_connections: it should be greater than or equal to 1, not 0",
    ]


def test_a_notice_without_its_length_is_of_no_use(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        GOOD
        + """\
[preemption]
file = "notice"
url = "169.254.169.254/spot"
url_pattern = "("
""",
    )
    assert problems(WorkerConfig, file) == [
        "config.toml:5: preemption.notice_s: say how many seconds before the machine's end a notice (file, "
        "url) comes (AWS 120, Google Cloud and Azure 30)",
        "config.toml:7: preemption.url: 169.254.169.254/spot is no http or https address",
        "config.toml:8: preemption.url_pattern: it is no regular expression: missing ), unterminated "
        "subpattern at position 0",
    ]
    file = write(tmp_path, GOOD + '[preemption]\nfile = "notice"\nnotice_s = 10\npoll_s = 6\n')
    assert problems(WorkerConfig, file) == [
        "config.toml:8: preemption.poll_s: a notice of 10 s may be seen after 6; look at least twice in that "
        "time"
    ]
    file = write(tmp_path, GOOD + '[preemption]\nfile = "notice"\nnotice_s = 10\n')
    assert load_config(WorkerConfig, file, environ={}).preemption.file == tmp_path / "notice"
