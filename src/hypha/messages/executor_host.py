"""Between a worker and an executor host: MessagePack over a Unix socket, one message a packet."""

from __future__ import annotations

from hypha.messages.values import Message, Value


class ForkRequest(Value):
    """Fork an executor that runs ``main`` of ``module`` with ``arguments`` in ``directory``. With it go three
    descriptors: where it is answered, the lifeline of the executor's keeper, and where output goes.

    ``python``, ``package`` and ``inherited`` are the worker's own interpreter, installation and limits: a
    host with other ones would make another executor than the worker itself.
    """

    module: str
    arguments: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    python: str
    package: str
    inherited: dict[str, str]
    #: as :class:`hypha.processes.keeper.Confinement` takes them
    keeper_options: tuple[str, ...] = ()
    #: the host need not have imported transformers and accelerate yet
    torch_only: bool = False


class Forked(Message):
    """The keeper runs; it leads a session and a process group of its own."""

    pid: int


class NotForked(Message):
    """The worker has to start this executor itself."""

    reason: str


class KeeperEnded(Message):
    """Nothing of the executor is left; ``status`` is its wait status. One that was killed says nothing."""

    status: int


ForkReply = Forked | NotForked | KeeperEnded
