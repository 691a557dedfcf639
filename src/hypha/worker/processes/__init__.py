"""An executor's process: started or forked, kept, isolated, ended with all that it started.

- Executors outliving a killed worker: each runs under a keeper process (:mod:`hypha.processes.keeper`); one
  that kills its keeper: worker and executor host are child subreapers, and end what they adopt.
- Importing torch and transformers takes seconds: a worker's executor host (:mod:`hypha.executor.host`) has
  done so, and forks keeper and executor on request (``warm.py``).
- Executors that are not trusted: ``runtime = "bwrap"``: namespaces by bubblewrap (``isolation.py``); what the
  worker relies on lies in ``.hypha-<id>``, beside the job directory.
"""
