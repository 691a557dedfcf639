"""All that the doctor can find: a check is what may be found anywhere, a finding is what was found here.

Most of it is the table of which docs/troubleshooting.md is made. Each check has a judge in ``judging/`` that
finds it, and a test that stages its cause (``tests/cli/doctor``). The symptoms are those of the
specification, in its order, and two more of the machine below a node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: a note is no fault; a warning costs time or will be an error; with an error something does not work
Severity = Literal["note", "warning", "error"]
#: of ``hypha doctor``, see :mod:`hypha.errors`
EXIT_CODES: dict[Severity, int] = {"note": 0, "warning": 7, "error": 8}
SEVERITIES = tuple(EXIT_CODES)


@dataclass(eq=False)
class Check:
    """``what`` is found, ``why`` it matters, what ``mend``\\ s it; with <places> for what differs."""

    severity: Severity
    symptom: Symptom
    what: str
    why: str
    mend: str
    name: str = ""

    def found(
        self, what: str, mend: str | None = None, severity: Severity | None = None, **places: object
    ) -> Finding:
        """That it is so here: ``what`` exactly, and the very command that mends it, or its <places>."""
        told = self.mend if mend is None else mend
        for place, value in places.items():
            told = told.replace(f"<{place}>", str(value))
        return Finding(self, what, told, severity or self.severity)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    check: Check
    what: str
    mend: str
    severity: Severity

    def __str__(self) -> str:
        return f"{self.severity}: {self.check.name}: {self.what}. {self.check.why}. To mend it: {self.mend}"


def exit_code_of(findings: Iterable[Finding]) -> int:
    """That of the gravest of them; 0 where there is none."""
    return max((EXIT_CODES[one.severity] for one in findings), default=0)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first, each once."""
    return sorted(dict.fromkeys(findings), key=lambda one: -SEVERITIES.index(one.severity))


@dataclass(frozen=True)
class Symptom:
    """What somebody sees who has one of the faults: a section of the page. Its methods make its checks."""

    title: str

    def note(self, what: str, why: str, mend: str) -> Check:
        return Check("note", self, what, why, mend)

    def warning(self, what: str, why: str, mend: str) -> Check:
        return Check("warning", self, what, why, mend)

    def error(self, what: str, why: str, mend: str) -> Check:
        return Check("error", self, what, why, mend)


CANNOT_CONNECT = Symptom("Nodes cannot connect to the network")

GATEWAY_NAME = CANNOT_CONNECT.error(
    "the name in a gateway's address has no IP address here",
    "A node that finds no gateway is in no network",
    "correct the name in gateway_addresses, or look at the resolver: `getent hosts <name>`",
)
GATEWAY_UNREACHABLE = CANNOT_CONNECT.error(
    "nothing listens at a gateway's address, or nothing answers there",
    "A node that reaches no gateway is in no network",
    "start the gateway, correct gateway_addresses, or let TCP to its port through every firewall on the way",
)
GATEWAY_OTHER = CANNOT_CONNECT.error(
    "at a gateway's address there is no gateway, or another one than the address names",
    "A node uses nobody else as its gateway than who proves to be one",
    "correct the address or its /p2p/ part in gateway_addresses; `hypha-gateway run` prints what to write",
)
GATEWAY_TRUST = CANNOT_CONNECT.error(
    "this node and a gateway do not accept each other's certificates",
    "Every connection begins with a TLS handshake in which both ends prove who they are",
    "give both the CAs of the other in trust_pem; `hypha-certutil show <cert_pem>` says who issued what",
)
CERTIFICATE_UNUSABLE = CANNOT_CONNECT.error(
    "certificate, key, trust bundle or revocation lists are not there, or do not fit together",
    "Without them a node does not start",
    "make them again with `hypha-certutil node`, or correct the path in the configuration",
)
CERTIFICATE_EXPIRED = CANNOT_CONNECT.error(
    "a certificate of this node is over, or not valid yet",
    "Everybody refuses it",
    "`hypha-certutil renew <cert_pem> --ca-cert <ca> --ca-key <key>`; not valid yet: set the clock",
)
CERTIFICATE_EXPIRES = CANNOT_CONNECT.warning(
    "a certificate of this node ends within two weeks",
    "From then on everybody refuses it",
    "`hypha-certutil renew <cert_pem> --ca-cert <ca> --ca-key <key>`",
)
CERTIFICATE_ROLE = CANNOT_CONNECT.error(
    "the certificate does not carry the role of this component",
    "Others refuse what a role may not do, and nodes without any role altogether",
    "`hypha-certutil renew <cert_pem> --role <component> --ca-cert <ca> --ca-key <key>`",
)
KEY_READABLE = CANNOT_CONNECT.error(
    "others can read the private key",
    "Whoever has the key is this node, so a node refuses to start with it",
    "`chmod 600 <key_pem>`",
)
CRL_OLD = CANNOT_CONNECT.warning(
    "a revocation list is out of date, or will be within three days",
    "Who was revoked since is let in",
    "`hypha-certutil revoke --ca-cert <ca> --ca-key <key> --crl <crls_pem>`, and copy it to all nodes",
)
CLOCK_SKEW = CANNOT_CONNECT.warning(
    "this machine's clock differs from its peers' by more than ten seconds",
    "Certificates are judged by the clock, and logs of several nodes cannot be put in order",
    "`timedatectl set-ntp true`",
)
SAME_CERTIFICATE = CANNOT_CONNECT.warning(
    "another machine is connected with the certificate of this node",
    "Two nodes with one certificate are one to everybody else, so the second one is turned away",
    "make a certificate for each machine: `hypha-certutil node --name <name> --role <component>`",
)
NOT_DIALABLE = CANNOT_CONNECT.warning(
    "a gateway cannot dial the addresses that this node announces",
    "Others reach it through the gateway alone, as fast as that one's line",
    "open its port in the firewall, forward it in the router, or correct external_addresses",
)
EXTERNAL_ADDRESS = CANNOT_CONNECT.warning(
    "an address in external_addresses leads to somebody else, or nowhere",
    "Others are told to dial it",
    "correct external_addresses; where only this machine cannot dial it (NAT without hairpin), it is right",
)


DISCONNECTS = Symptom("Intermittent disconnections")

NETWORK_UNSTABLE = DISCONNECTS.warning(
    "of a row of small requests several take much longer than the rest, or get no answer",
    "Packets are lost on the way: connections stall, and are cut after ten seconds of silence",
    "look at the line: `mtr --tcp --port <port> <host>`; Wi-Fi, a full uplink and a bad cable look like this",
)
LARGE_PACKETS = DISCONNECTS.error(
    "small requests are answered, and large ones are not",
    "Full packets are lost where a tunnel takes smaller ones: files hang, and connections are cut",
    '`ip link set dev <interface> mtu 1280`, or let ICMP "fragmentation needed" through the firewall',
)
SMALL_MTU = DISCONNECTS.note(
    "the path to a peer takes packets of less than 1280 bytes",
    "Each packet carries less, which costs processor time",
    "look at tunnels on the way: `tracepath -n <host>`",
)
GATEWAY_UNWELL = DISCONNECTS.warning(
    "a gateway says that it is not well, or nine tenths of its connections, circuits or places are taken",
    "It turns away who comes next",
    "raise max_connections, max_circuits or max_reservations of the gateway, or start another one",
)
LEASE_SHORT = DISCONNECTS.warning(
    "a quarter of offer.lease_s is shorter than interruptions that this network has",
    "A lease is renewed at three quarters of its life: a silence of the last quarter ends it",
    "set offer.lease_s to at least <seconds> in the worker's configuration (the default is 30)",
)


SLOW_TRAINING = Symptom("Slow training progress")

STRAGGLERS = SLOW_TRAINING.warning(
    "workers spend more than a fifth of their time waiting for slower ones",
    "A round is as long as its slowest worker",
    "`hypha status` names them; stop such a worker, or set rounds.quorum and a shorter rounds.deadline_s",
)
WAITING_FOR_DATA = SLOW_TRAINING.warning(
    "workers spend more than a fifth of their time in no batch, waiting for data",
    "They train on nothing meanwhile",
    "raise cache.prefetch_s, prepare smaller slices (`hypha-data prepare --slice-samples`), add a data node",
)
BANDWIDTH_LOW = SLOW_TRAINING.warning(
    "less than a megabit a second gets through to a gateway or a peer",
    "An update of a small model takes minutes",
    "look at who else uses the line; `hypha doctor` from another machine of it tells them apart",
)
GPU_UNUSABLE = SLOW_TRAINING.error(
    "a GPU is here, or its memory is offered, and torch cannot use it",
    "Jobs fail, or train on the processor, tens of times slower",
    "install a torch for this GPU (https://pytorch.org), or set resources.gpu to 0",
)
GPU_DRIVER = SLOW_TRAINING.error(
    "the GPU's driver is older than what torch was built for",
    "With it torch finds no GPU",
    "upgrade the driver to at least <version>, or install a torch for an earlier CUDA",
)
GPU_IDLE = SLOW_TRAINING.warning(
    "an executor trains, and the GPU is used for less than half of the time",
    "The rest of it waits for data, or for the processor",
    "raise rounds.batch_size; where workers wait for data, raise cache.prefetch_s",
)
TORCH_BROKEN = SLOW_TRAINING.error(
    "torch or transformers cannot be imported",
    "Hypha's own executors need both",
    "`pip install 'hypha-train[train]'` in the same environment",
)
SOCKET_BUFFERS = SLOW_TRAINING.warning(
    "the kernel's largest TCP buffers are smaller than bandwidth times round trip",
    "What is on its way must fit into them, so they bound how fast files go",
    '`sysctl -w net.ipv4.tcp_rmem="4096 87380 134217728" net.ipv4.tcp_wmem="4096 65536 134217728"`',
)
VERSIONS_DIFFER = SLOW_TRAINING.note(
    "a peer runs with other versions of Hypha, Python, torch or what goes with it",
    "A worker without a feature is not given the job, and a replay of the job may differ in the last bits",
    "install the same everywhere: `pip install -c constraints.txt '.[train]'`",
)
DISK_SLOW = SLOW_TRAINING.warning(
    "less than 5 MB a second can be written where a node writes",
    "Slices, updates and checkpoints go through the disk",
    "move work_dir or state_dir to a faster disk",
)


SYNCHRONIZATION = Symptom("High synchronization overhead")

SYNCHRONIZATION_OVERHEAD = SYNCHRONIZATION.warning(
    "workers spend more than a fifth of their time between rounds, waiting for theta",
    "Rounds are short for what a synchronisation takes",
    'raise rounds.avg_samples_between_updates (or inner_steps), or set update_encoding = "bf16"',
)
PARAMETER_SERVER_SMALL = SYNCHRONIZATION.warning(
    "the job asks for less memory for its parameter server than theta, momentum and one sum of updates take",
    "It is ended for want of memory in its first round",
    "set scheduler.job.resources.parameter_server.memory to at least <GB>",
)
UPDATE_SLOW = SYNCHRONIZATION.warning(
    "over this line an update and the new theta take longer than a round waits for a late worker",
    "Rounds are closed without this worker",
    'set update_encoding to "bf16" or "int8", raise rounds.deadline_s, or use a faster line',
)


NO_OFFERS = Symptom("Workers not receiving offers")

OFFER_EXECUTOR = NO_OFFERS.error(
    "the worker has no executor of the class and name that the job asks for",
    "It does not answer the job's requests",
    "add an [[executors]] entry for it, or correct resources.worker_executor of the job",
)
OFFER_FEATURES = NO_OFFERS.error(
    "the job needs what the worker's version does not have",
    "It does not answer the job's requests",
    "upgrade Hypha on the worker, or leave that out of the job",
)
OFFER_RESOURCES = NO_OFFERS.error(
    "the job asks for more than the worker offers",
    "It does not answer the job's requests",
    "raise <resource> in the worker's [resources], or lower it in scheduler.job.resources",
)
OFFER_PRICE = NO_OFFERS.error(
    "the job bids less than the worker's floor, or pays at most less than its price",
    "No lease comes of it, whatever else fits",
    "lower offer.floor or offer.price of the worker, or raise bid and max of the job's price",
)
RESOURCES_MISSING = NO_OFFERS.warning(
    "the worker is configured to offer more than this machine has",
    "Jobs that ask for so much get no offer, or, with detect_resources = false, are ended for want of memory",
    "set [resources] to what there is; `hypha-worker init` finds it out",
)
DISK_FULL = NO_OFFERS.error(
    "there is hardly any room left where a node writes",
    "Below 32 MB a worker offers nothing, and a scheduler's job stands still; 2 GB are soon written",
    "make room in <directory>, or move work_dir or state_dir",
)


LEASES = Symptom("Lease failures")

RENEWALS_FAIL = LEASES.warning(
    "more than a tenth of the lease renewals of the running scheduler have failed",
    "A lease that is not renewed ends, and what runs under it",
    "look at its log for who it was; `hypha doctor -c <config> --peer <address>` looks at the way to one",
)
PEER_UNREACHABLE = LEASES.error(
    "a peer that was named with --peer cannot be reached, or does not answer",
    "Leases are renewed, and files sent, from node to node",
    "start it, open its port, or let it keep a relay reservation (relay_circuit = true)",
)


NO_DATASET = Symptom("Dataset not found")

DATASET_NOT_ANNOUNCED = NO_DATASET.error(
    "no data node announces the dataset at the gateways",
    "The job waits, and ends with exit code 3",
    "start `hypha-data run` with it, connected to the same gateways",
)
DATASET_NAME = NO_DATASET.error(
    "the dataset is served under a name that differs a little",
    "Names are compared as they are written",
    "correct scheduler.job.dataset.dataset, or `name` of the data node's [[datasets]]",
)
DATASET_UNREACHABLE = NO_DATASET.error(
    "a data node announces the dataset and cannot be reached, or does not answer",
    "Announcements live longer than their nodes",
    "look whether it runs, and from there with `hypha doctor -c <its configuration>`",
)
DATASET_REFUSED = NO_DATASET.error(
    "a data node that announces the dataset does not give it to this node, or the job does not take it",
    "Organisations and roles decide who gets what",
    "look at organizations of the data node's [[datasets]], and at those of scheduler.job.dataset",
)
DATASET_DIFFERS = NO_DATASET.warning(
    "data nodes serve different data under one name",
    "Only one of them is used, and perhaps not the one that is meant",
    "set scheduler.job.dataset.manifest_hash, or give one of them another name",
)
DATASET_UNUSABLE = NO_DATASET.error(
    "a directory that this data node is to serve holds no prepared dataset",
    "The node does not start",
    "`hypha-data prepare <source> <directory>`, or correct its path",
)


SLOW_FETCHES = Symptom("Slow data fetches")

SLICE_SLOW = SLOW_FETCHES.warning(
    "a slice takes more than a minute from a data node to here",
    "Workers wait for it",
    "start another data node with the same dataset, or prepare smaller slices",
)
DATA_RELAYED = SLOW_FETCHES.warning(
    "a data node is reached through a relay only",
    "All slices go through the gateway, as fast as its line",
    "open the data node's port, or set its external_addresses",
)
FETCHES_FAIL = SLOW_FETCHES.warning(
    "of the running worker's fetches a tenth failed, or they take more than a minute in the mean",
    "It waits for data instead of training",
    "look at its log for which data node it was; start another one with the same dataset",
)


MACHINE = Symptom("A node does not start, or not for long")

CONFIGURATION = MACHINE.error(
    "the configuration has a key or a value that cannot be",
    "The node does not start",
    "correct it; `hypha-<component> validate -c <config>` checks it again",
)
PORT_IN_USE = MACHINE.error(
    "another process has the port that this node is to listen on, or the address is not this machine's",
    "The node does not start",
    "`ss -ltnp 'sport = :<port>'` names it; end it, or choose another port",
)
FILE_DESCRIPTORS = MACHINE.warning(
    "fewer files may be open than this node may have connections",
    "Who comes when all are taken is not let in, and files cannot be written",
    "`ulimit -n 65536`, or LimitNOFILE=65536 in the service's unit",
)
DIRECTORY = MACHINE.error(
    "a directory that this node writes to cannot be written by this user",
    "The node does not start, or fails with its first job",
    "`chown $(id -un) <directory>`, or choose another one",
)
NOT_CHECKED = MACHINE.note(
    "something could not be found out",
    "What it would have shown is not known",
    "look at the other findings first, and run `hypha doctor` again",
)

#: by name, in the order of the page; GATEWAY_NAME is called gateway-name
CHECKS = {name.lower().replace("_", "-"): one for name, one in list(vars().items()) if isinstance(one, Check)}
for _name in CHECKS:
    CHECKS[_name].name = _name
