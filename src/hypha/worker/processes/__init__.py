"""An executor's process: started or forked, kept, isolated, ended with all that it started.

- Executors outliving a killed worker: each runs under a keeper process (``keeper.py``) that dies with the
  worker and takes all descendants along; a parent-death signal fires when trio's thread ends.
- Importing torch and transformers takes seconds: a worker's executor host (``executor/host.py``) has done so,
  and forks keeper and executor on request, which come with the lifeline and output pipe of the worker; one
  thread, no device, else it refuses. Where a variable that is read at import differs, or the installation,
  user, cores or limits, the executor is started instead. The keeper tells the worker itself how it ended, so
  the host may die. A dispatch waits for a host that is importing, 30 s at most: it has begun before, in the
  order in which an executor would.
- Executors that are not trusted: ``runtime = "bwrap"``: namespaces by bubblewrap, started cold; what the
  worker relies on lies in ``.hypha-<id>``, beside the job directory.
- An executor that kills its keeper: worker and executor host are child subreapers, and end what they adopt.
"""
